//! What the guests run: programs for CPL 3, as bytes that are copied into a guest's memory.
//!
//! Each takes its arguments in registers, touches nothing but what they name, has no stack,
//! and ends by a store to the address in `r9`, at which nothing is: the store leaves the
//! guest, and its value is the program's result. A waiting program looks at the word at
//! `r10` as well, and ends when that is not zero.

use std::arch::global_asm;

global_asm!(
    ".pushsection .rodata.kvm_pair, \"a\"",
    // Kicks and waits for the answer, rsi times. The answer is an interrupt, whose handler
    // counts the word at r8 up. Stores the time of each round to rdi on, 8 bytes each.
    // r11: doorbell; ecx: what to store there. Result: rounds that were not made.
    ".globl kvm_pair_measure",
    ".hidden kvm_pair_measure",
    "kvm_pair_measure:",
    "    mov ebp, [r8]",
    "20: lfence",
    "    rdtsc",
    "    mov ebx, eax",
    "    mov r12d, edx",
    "    mov [r11], cx",
    "21: mov eax, [r8]",
    "    cmp eax, ebp",
    "    jne 22f",
    "    cmp dword ptr [r10], 0",
    "    jne 29f",
    "    pause",
    "    jmp 21b",
    "22: mov ebp, eax",
    "    rdtsc",
    "    sub eax, ebx",
    "    sbb edx, r12d",
    "    mov [rdi], eax",
    "    mov [rdi + 4], edx",
    "    add rdi, 8",
    "    dec rsi",
    "    jnz 20b",
    "29: mov [r9], rsi",
    "    ud2",
    ".globl kvm_pair_measure_end",
    ".hidden kvm_pair_measure_end",
    "kvm_pair_measure_end:",
    // Answers each change of the word at r8 by a store of cx to the doorbell r11, until it is
    // told to end. ebp: the value of the word that is known already. Result: answers.
    ".globl kvm_pair_echo",
    ".hidden kvm_pair_echo",
    "kvm_pair_echo:",
    "    xor esi, esi",
    "30: mov eax, [r8]",
    "    cmp eax, ebp",
    "    jne 31f",
    "    cmp dword ptr [r10], 0",
    "    jne 39f",
    "    pause",
    "    jmp 30b",
    "31: mov ebp, eax",
    "    mov [r11], cx",
    "    inc rsi",
    "    jmp 30b",
    "39: mov [r9], rsi",
    "    ud2",
    ".globl kvm_pair_echo_end",
    ".hidden kvm_pair_echo_end",
    "kvm_pair_echo_end:",
    // Stores cx to the doorbell r11, rsi times, with r12 turns of a loop in between, then
    // ends. Result: 0.
    ".globl kvm_pair_kick",
    ".hidden kvm_pair_kick",
    "kvm_pair_kick:",
    "40: mov [r11], cx",
    "    mov rax, r12",
    "41: dec rax",
    "    jns 41b",
    "    dec rsi",
    "    jnz 40b",
    "    mov [r9], rsi",
    "    ud2",
    ".globl kvm_pair_kick_end",
    ".hidden kvm_pair_kick_end",
    "kvm_pair_kick_end:",
    // Does nothing but let interrupts come, until it is told to end. Result: 0.
    ".globl kvm_pair_idle",
    ".hidden kvm_pair_idle",
    "kvm_pair_idle:",
    "50: cmp dword ptr [r10], 0",
    "    jne 59f",
    "    pause",
    "    jmp 50b",
    "59: xor esi, esi",
    "    mov [r9], rsi",
    "    ud2",
    ".globl kvm_pair_idle_end",
    ".hidden kvm_pair_idle_end",
    "kvm_pair_idle_end:",
    // Of each page from rdi to rsi, and then of each from r14 to r15: loads the word at its
    // start, records it in the table at r8 (8 bytes a page), and counts the word at r11 + 8 up
    // if its top 16 bits are those in bx. Stores a number of its own to the second word of each
    // page of the first range; of one page of the second range, another one each time; and of
    // the page whose address is in the word at r11 + 16, if any. Then the word at r11 is counted
    // up, and all begins anew, until it is told to end. Result: 0.
    ".globl kvm_pair_hammer",
    ".hidden kvm_pair_hammer",
    "kvm_pair_hammer:",
    "    mov rbp, 1",
    "    mov r13, r14",
    "60: mov rdx, rdi",
    "    mov rcx, r8",
    "61: mov rax, [rdx]",
    "    mov [rcx], rax",
    "    shr rax, 48",
    "    cmp ax, bx",
    "    jne 62f",
    "    inc qword ptr [r11 + 8]",
    "62: mov [rdx + 8], rbp",
    "    inc rbp",
    "    add rdx, 4096",
    "    add rcx, 8",
    "    cmp rdx, rsi",
    "    jb 61b",
    "    mov rdx, r14",
    "63: mov rax, [rdx]",
    "    mov [rcx], rax",
    "    shr rax, 48",
    "    cmp ax, bx",
    "    jne 64f",
    "    inc qword ptr [r11 + 8]",
    "64: add rdx, 4096",
    "    add rcx, 8",
    "    cmp rdx, r15",
    "    jb 63b",
    "    mov [r13 + 8], rbp",
    "    add r13, 4096",
    "    cmp r13, r15",
    "    jb 65f",
    "    mov r13, r14",
    "65: mov rdx, [r11 + 16]",
    "    test rdx, rdx",
    "    jz 66f",
    "    mov [rdx + 8], rbp",
    "66: inc qword ptr [r11]",
    "    cmp dword ptr [r10], 0",
    "    je 60b",
    "    xor esi, esi",
    "    mov [r9], rsi",
    "    ud2",
    ".globl kvm_pair_hammer_end",
    ".hidden kvm_pair_hammer_end",
    "kvm_pair_hammer_end:",
    ".popsection",
);

macro_rules! programs {
    ($($(#[$doc:meta])* $name:ident, $start:ident, $end:ident;)*) => {
        unsafe extern "C" { $(static $start: u8; static $end: u8;)* }
        $($(#[$doc])*
        pub fn $name() -> &'static [u8] {
            let (start, end) = (&raw const $start, &raw const $end);
            // SAFETY: both are labels of the block above, in this order and in one section,
            // whose bytes are read-only data of the program's own, there for its whole life.
            unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
        })*
    };
}

programs! {
    /// Measures round trips.
    measure, kvm_pair_measure, kvm_pair_measure_end;
    /// Answers.
    echo, kvm_pair_echo, kvm_pair_echo_end;
    /// Kicks.
    kick, kvm_pair_kick, kvm_pair_kick_end;
    /// Waits.
    idle, kvm_pair_idle, kvm_pair_idle_end;
    /// Uses the window.
    hammer, kvm_pair_hammer, kvm_pair_hammer_end;
}
