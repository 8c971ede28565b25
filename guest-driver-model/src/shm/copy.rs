//! Bulk copies by the widest registers that the processor has.
//!
//! Owns: the choice, made once. A short copy of a length that is not known in advance is
//! a call, a few jumps and two overlapping moves in the C library; here it is one masked
//! move a cache line, in the middle of the caller's loop.

use std::sync::atomic::{AtomicU64, Ordering};

/// What copies are made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Engine {
    /// 64 bytes a move, the last ones under a mask (AVX-512F and -BW).
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    Avx512,
    /// The C library's `memcpy`, which chooses by itself.
    Library,
    /// The same, and [`COUNTED`] grows by each byte.
    Counted,
}

/// Bytes copied by [`Engine::Counted`].
pub(super) static COUNTED: AtomicU64 = AtomicU64::new(0);

/// Length of a cache line, and of an AVX-512 register, bytes.
const LINE: usize = 64;
/// From this length on the library's `memcpy` is as good: it looks further ahead.
#[cfg(all(target_arch = "x86_64", not(miri)))]
const LONG: usize = 4096;

impl Engine {
    /// The fastest that this processor has.
    pub(super) fn fastest() -> Self {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        if std::arch::is_x86_feature_detected!("avx512f") && std::arch::is_x86_feature_detected!("avx512bw") {
            return Self::Avx512;
        }
        Self::Library
    }

    #[inline(always)]
    fn count(self, len: usize) {
        if self == Self::Counted {
            // Relaxed: a sum, and orders nothing.
            COUNTED.fetch_add(len as u64, Ordering::Relaxed);
        }
    }

    /// Copies `len` bytes. What arrives of a byte is what one load found, where the library's moves
    /// overlap, too.
    ///
    /// # Safety
    /// `from` is valid for loads and `to` for stores of `len` bytes, and they do not
    /// overlap. Either may be changed by others meanwhile if the compiler is told so
    /// (`other_vm_may_have_written`).
    #[inline(always)]
    pub(super) unsafe fn copy(self, from: *const u8, to: *mut u8, len: usize) {
        match self {
            #[cfg(all(target_arch = "x86_64", not(miri)))]
            Self::Avx512 if len < LONG => {
                // SAFETY: the caller's promise; the engine was chosen because the
                // processor has these instructions.
                unsafe { copy_avx512(from, to, len) };
            }
            _ => {
                self.count(len);
                // SAFETY: the caller's promise.
                unsafe { std::ptr::copy_nonoverlapping(from, to, len) }
            }
        }
    }

    /// The same, where the two may overlap: then anything may arrive.
    ///
    /// # Safety
    /// As [`Self::copy`], but for the overlap.
    #[inline(always)]
    pub(super) unsafe fn copy_between(self, from: *const u8, to: *mut u8, len: usize) {
        match self {
            #[cfg(all(target_arch = "x86_64", not(miri)))]
            Self::Avx512 if len < LONG => {
                // SAFETY: as in `copy`. To the compiler it is one store of anything.
                unsafe { copy_avx512(from, to, len) };
            }
            _ => {
                self.count(len);
                // SAFETY: the caller's promise.
                unsafe { std::ptr::copy(from, to, len) }
            }
        }
    }
}

/// # Safety
/// As [`Engine::copy`], on a processor with AVX-512F and -BW.
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[inline(always)]
unsafe fn copy_avx512(mut from: *const u8, mut to: *mut u8, mut len: usize) {
    use std::arch::asm;

    while len >= 4 * LINE {
        // SAFETY: 256 bytes are left of both. The registers are no compiler's without
        // AVX-512, and are named for one that has it.
        unsafe {
            asm!(
                "vmovdqu64 zmm16, [{from}]",
                "vmovdqu64 zmm17, [{from} + 64]",
                "vmovdqu64 zmm18, [{from} + 128]",
                "vmovdqu64 zmm19, [{from} + 192]",
                "vmovdqu64 [{to}], zmm16",
                "vmovdqu64 [{to} + 64], zmm17",
                "vmovdqu64 [{to} + 128], zmm18",
                "vmovdqu64 [{to} + 192], zmm19",
                from = in(reg) from,
                to = in(reg) to,
                out("xmm16") _, out("xmm17") _, out("xmm18") _, out("xmm19") _,
                options(nostack, preserves_flags),
            );
            from = from.add(4 * LINE);
            to = to.add(4 * LINE);
        }
        len -= 4 * LINE;
    }
    while len >= LINE {
        // SAFETY: as above, with 64 bytes.
        unsafe {
            asm!(
                "vmovdqu64 zmm16, [{from}]",
                "vmovdqu64 [{to}], zmm16",
                from = in(reg) from,
                to = in(reg) to,
                out("xmm16") _,
                options(nostack, preserves_flags),
            );
            from = from.add(LINE);
            to = to.add(LINE);
        }
        len -= LINE;
    }
    if len > 0 {
        let mask = u64::MAX >> (LINE - len);
        // SAFETY: as above; bytes outside of the mask are not accessed and do not fault.
        unsafe {
            asm!(
                "kmovq k1, {mask}",
                "vmovdqu8 zmm16 {{k1}} {{z}}, [{from}]",
                "vmovdqu8 [{to}] {{k1}}, zmm16",
                mask = in(reg) mask,
                from = in(reg) from,
                to = in(reg) to,
                out("k1") _, out("xmm16") _,
                options(nostack, preserves_flags),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_is_copied_and_nothing_beyond_it() {
        let from: Vec<u8> = (0..3 * LONG_TEST).map(|byte| (byte % 251) as u8).collect();
        for engine in [Engine::fastest(), Engine::Library] {
            for len in (0..700).chain([1500, 4095, 4096, 4097, LONG_TEST]) {
                for shift in [0, 1, 12, 63] {
                    let mut to = vec![0xee; 2 * LONG_TEST];
                    // SAFETY: both vectors are longer than `len` and `shift` together.
                    unsafe { engine.copy(from.as_ptr().add(shift), to.as_mut_ptr().add(64 - shift), len) };
                    let (before, rest) = to.split_at(64 - shift);
                    let (copied, behind) = rest.split_at(len);
                    assert!(
                        before.iter().chain(behind).all(|byte| *byte == 0xee),
                        "{engine:?} {len} {shift}"
                    );
                    assert_eq!(copied, &from[shift..shift + len], "{engine:?} {len} {shift}");
                }
            }
        }
    }

    const LONG_TEST: usize = 9000;
}
