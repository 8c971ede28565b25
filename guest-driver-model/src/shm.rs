//! Memory that another VM can rewrite at any moment.
//!
//! Owns: the bounds of such memory, what keeps it mapped, and each way to touch
//! it. It is the only module of the data path with `unsafe`. It never makes a
//! `&T`, `&mut T` or slice into the memory, and it never interprets what it reads.
//!
//! # Why racing with the other VM is sound here
//!
//! - Words (indices, flags, descriptors) are read and written by *atomic*
//!   operations of exactly the field's size. Each call is one access: the compiler
//!   may neither repeat nor split it. A caller that keeps the result in a local has
//!   therefore fetched the field once. Only a slot of a packed ring is stored by one store
//!   over several of its fields (`PackedSlots`), which the other side loads one by one. No
//!   language has a rule for that, but the other side is no part of this program, and the
//!   processor has: an aligned store of 8 bytes (on x86-64 with AVX, of 16) is one store,
//!   so that a load of any part of it finds all of it done or nothing, and it is ordered
//!   against other loads and stores like one of any size.
//! - Bulk bytes (packets, indirect tables) are moved by a plain `memcpy`, between
//!   two empty `asm!` blocks that may, for all the compiler knows, rewrite all of
//!   memory. The stores of the other VM are no accesses of this program; the
//!   compiler sees them as done by these blocks, on this thread. Hence it can
//!   neither use what it knew of the shared bytes before the copy, nor, after the
//!   copy, read them again in place of the private copy (which it does with a bare
//!   `copy_nonoverlapping`, and which would be a double fetch). What remains is
//!   tearing: while `memcpy` runs each byte may be the old one or the new one, and
//!   any bytes are valid for `u8`. A volatile or per-byte atomic loop would say the
//!   same at a tenth of the speed; `vm-memory` decided likewise.
//!
//! All words are little-endian, as virtio's and the link page's are, and all
//! offsets and lengths are in bytes.
#![allow(unsafe_code)]

mod copy;
pub mod log;
pub(crate) mod mapping;

use std::any::Any;
use std::fmt;
use std::io;
use std::mem::offset_of;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use self::copy::Engine;
use self::log::{WriteLog, Wrote};
use self::mapping::MappedRange;
use nix::sys::stat::{SFlag, fstat};

/// An access that does not fit the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShmError {
    /// The range is not inside the memory.
    #[error("{len} bytes at {offset:#x} are not inside a memory of {memory_len:#x} bytes")]
    OutOfBounds {
        /// Start of the range.
        offset: u64,
        /// Length of the range.
        len: u64,
        /// Length of the memory.
        memory_len: u64,
    },
    /// A word's address is not a multiple of its alignment.
    #[error("offset {offset:#x} is not aligned to {align} bytes")]
    Misaligned {
        /// Where the word is.
        offset: u64,
        /// The alignment that it needs.
        align: usize,
    },
}

/// Memory that is shared with another VM or process, mapped for reading and
/// writing. Clones name the same memory and keep it mapped.
#[derive(Clone)]
pub struct SharedMemory {
    base: NonNull<u8>,
    len: usize,
    copies: Engine,
    keep: Arc<dyn Any + Send + Sync>,
    /// Where what is stored is marked, if it is.
    log: Option<Arc<WriteLog>>,
}

// SAFETY: the memory has no owning thread: every access is by atomics or by the raw
// copies described above, and `keep`, which keeps it mapped, is Send and Sync.
unsafe impl Send for SharedMemory {}
// SAFETY: as for Send; no method hands out a reference into the memory.
unsafe impl Sync for SharedMemory {}

impl fmt::Debug for SharedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedMemory({:p}, {:#x} bytes)", self.base, self.len)
    }
}

/// Stands, for the compiler, for whatever the other VM did up to here.
#[inline(always)]
fn other_vm_may_have_written() {
    #[cfg(not(miri))]
    // SAFETY: the block holds no instruction.
    unsafe {
        std::arch::asm!("", options(nostack, preserves_flags));
    }
}

/// Declares the accesses to one size of word.
macro_rules! words {
    ($($native:ty, $atomic:ty, $at:ident, $load:ident, $load_acquire:ident, $store:ident, $store_release:ident;)*) => {$(
        #[inline]
        fn $at(&self, offset: u64) -> Result<&$atomic, ShmError> {
            let at = self.word(offset, size_of::<$native>())?;
            // SAFETY: `word` checked bounds and alignment, and `keep` keeps it mapped for as long as
            // `self` is borrowed. An atomic may change under its reference.
            Ok(unsafe { <$atomic>::from_ptr(at.as_ptr().cast()) })
        }

        #[doc = concat!("One relaxed load of a little-endian `", stringify!($native), "`.")]
        #[inline]
        pub fn $load(&self, offset: u64) -> Result<$native, ShmError> {
            // Relaxed: pairs with nothing; the caller orders it, if need be.
            Ok(<$native>::from_le(self.$at(offset)?.load(Ordering::Relaxed)))
        }

        #[doc = concat!("One acquire load of a little-endian `", stringify!($native), "`.")]
        #[inline]
        pub fn $load_acquire(&self, offset: u64) -> Result<$native, ShmError> {
            // Acquire: pairs with the other side's release store of the same word.
            Ok(<$native>::from_le(self.$at(offset)?.load(Ordering::Acquire)))
        }

        #[doc = concat!("One relaxed store of a little-endian `", stringify!($native), "`.")]
        #[inline]
        pub fn $store(&self, offset: u64, value: $native) -> Result<(), ShmError> {
            let word = self.$at(offset)?;
            // Relaxed: pairs with nothing; the caller orders it, if need be.
            word.store(value.to_le(), Ordering::Relaxed);
            self.wrote(NonNull::from(word).cast(), size_of::<$native>(), Wrote::Ring);
            Ok(())
        }

        #[doc = concat!("One release store of a little-endian `", stringify!($native), "`.")]
        #[inline]
        pub fn $store_release(&self, offset: u64, value: $native) -> Result<(), ShmError> {
            let word = self.$at(offset)?;
            // Release: pairs with the other side's acquire load of the same word.
            word.store(value.to_le(), Ordering::Release);
            self.wrote(NonNull::from(word).cast(), size_of::<$native>(), Wrote::Ring);
            Ok(())
        }
    )*};
}

impl SharedMemory {
    /// Maps `len` bytes of a file or device, from `file_offset` (a multiple of the
    /// page size) on, shared and for reading and writing.
    ///
    /// A regular file must be long enough. Who cannot trust the file's owner not to
    /// shorten it later must have sealed it: touching a page past the end is SIGBUS.
    pub fn map(fd: BorrowedFd<'_>, file_offset: u64, len: usize) -> io::Result<Self> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what);
        if len == 0 {
            return Err(invalid("an empty mapping"));
        }
        let end = file_offset.checked_add(len as u64).ok_or_else(|| invalid("the mapping wraps"))?;
        let stat = fstat(fd)?;
        let regular = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFREG;
        if regular && u64::try_from(stat.st_size).is_ok_and(|size| size < end) {
            return Err(invalid("the file ends before the mapping"));
        }
        Ok(Arc::new(MappedRange::of_file(fd, file_offset, len)?).shared())
    }

    /// Zeroed memory of this process, shared by its threads: where there is no other VM.
    ///
    /// # Errors
    /// What mmap answers; `InvalidInput` if `len` is 0.
    pub fn private(len: usize) -> io::Result<Self> {
        Ok(Arc::new(MappedRange::private(len)?).shared())
    }

    /// Takes memory that something else mapped.
    ///
    /// # Safety
    /// While `keep` or a clone of it lives, `len` bytes from `base` on are mapped
    /// for reading and writing, and this program touches them only through
    /// `SharedMemory`, or by atomics and raw copies as described at the module's top.
    pub unsafe fn from_raw_parts(base: NonNull<u8>, len: usize, keep: Arc<dyn Any + Send + Sync>) -> Self {
        Self { base, len, copies: Engine::fastest(), keep, log: None }
    }

    /// Length, bytes.
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Whether there is no memory at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The same memory, of whose bytes each that is copied by it, or by its parts and clones, is counted
    /// ([`Self::counted_bytes`]): words are not.
    pub fn counted(&self) -> Self {
        Self { copies: Engine::Counted, ..self.clone() }
    }

    /// The same memory, of which nothing is counted.
    pub fn uncounted(&self) -> Self {
        Self { copies: Engine::fastest(), ..self.clone() }
    }

    /// Bytes that this program has copied of memories that count.
    pub fn counted_bytes() -> u64 {
        // Relaxed: as where it grows.
        copy::COUNTED.load(Ordering::Relaxed)
    }

    /// Where the memory is in this process: for who gives it to a device.
    pub(crate) fn address(&self) -> u64 {
        self.base.addr().get() as u64
    }

    /// A part of the memory as a memory of its own, with offsets from its start.
    pub fn part(&self, offset: u64, len: u64) -> Result<Self, ShmError> {
        let base = self.range(offset, len)?;
        let (keep, log) = (Arc::clone(&self.keep), self.log.clone());
        Ok(Self { base, len: len as usize, copies: self.copies, keep, log })
    }

    /// The same memory; what is stored to it from now on by this and by what is made of it is marked in
    /// the log, which is of this memory as a window.
    pub fn logged(&self, log: &Arc<WriteLog>) -> Self {
        Self { log: Some(Arc::clone(log)), ..self.clone() }
    }

    /// After each store: marks what was written. Without a log it is a load and a jump that is never
    /// taken.
    #[inline(always)]
    fn wrote(&self, at: NonNull<u8>, len: usize, what: Wrote) {
        if let Some(log) = &self.log {
            log.mark(at, len, what);
        }
    }

    /// Sets a bit of a byte, which others may do at the same time.
    pub(crate) fn set_bit(&self, offset: u64, bit: u32) -> Result<(), ShmError> {
        let at = self.range(offset, 1)?;
        // SAFETY: `range` checked the place, and `keep` keeps it mapped. An atomic may change under its
        // reference.
        let byte = unsafe { AtomicU8::from_ptr(at.as_ptr()) };
        // Release: pairs with the owner's VMM, which takes the bit and then copies the page: what was stored
        // there before is in the copy.
        byte.fetch_or(1 << (bit % 8), Ordering::Release);
        Ok(())
    }

    /// The address of a range after checking that it is inside.
    #[inline]
    fn range(&self, offset: u64, len: u64) -> Result<NonNull<u8>, ShmError> {
        let memory_len = self.len as u64;
        if offset > memory_len || len > memory_len - offset {
            return Err(ShmError::OutOfBounds { offset, len, memory_len });
        }
        // SAFETY: `offset` is at most `len`, so the address is in the range that
        // `from_raw_parts` was promised, or one past its end.
        Ok(unsafe { self.base.add(offset as usize) })
    }

    /// The address of an aligned word after checking that it is inside.
    #[inline]
    fn word(&self, offset: u64, size: usize) -> Result<NonNull<u8>, ShmError> {
        let at = self.range(offset, size as u64)?;
        if !at.addr().get().is_multiple_of(size) {
            return Err(ShmError::Misaligned { offset, align: size });
        }
        trace::note(at, size);
        Ok(at)
    }

    words! {
        u16, AtomicU16, atomic_u16, load_u16, load_u16_acquire, store_u16, store_u16_release;
        u32, AtomicU32, atomic_u32, load_u32, load_u32_acquire, store_u32, store_u32_release;
        u64, AtomicU64, atomic_u64, load_u64, load_u64_acquire, store_u64, store_u64_release;
    }

    /// Copies bytes out. What arrives is private and does not change any more; it
    /// may be a mixture of what the other side wrote meanwhile.
    #[inline]
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), ShmError> {
        let from = self.range(offset, into.len() as u64)?;
        trace::note(from, into.len());
        other_vm_may_have_written();
        // SAFETY: `range` checked the source; `into` is exclusive and as long, and no
        // reference of this program names shared memory, so they do not overlap.
        // Races: see the module's top.
        unsafe { self.copies.copy(from.as_ptr(), into.as_mut_ptr(), into.len()) };
        other_vm_may_have_written();
        Ok(())
    }

    /// As [`Self::read`], of a length that the compiler knows: a few moves, no call.
    #[inline(always)]
    pub fn read_array<const N: usize>(&self, offset: u64) -> Result<[u8; N], ShmError> {
        let mut bytes = [0; N];
        self.read(offset, &mut bytes).map(|()| bytes)
    }

    /// Copies bytes in.
    #[inline]
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<(), ShmError> {
        let to = self.range(offset, from.len() as u64)?;
        other_vm_may_have_written();
        // SAFETY: `range` checked the target; `from` is private memory, as no
        // reference of this program names shared memory. Races: see the module's top.
        unsafe { self.copies.copy(from.as_ptr(), to.as_ptr(), from.len()) };
        other_vm_may_have_written();
        self.wrote(to, from.len(), Wrote::Payload);
        Ok(())
    }

    /// Copies bytes from this memory into another, or into another place of this one. Nobody looks
    /// at them on the way; where the two overlap anything may arrive.
    #[inline]
    pub fn copy_to(&self, from: u64, other: &Self, to: u64, len: u64) -> Result<(), ShmError> {
        let from = self.range(from, len)?;
        let to = other.range(to, len)?;
        trace::note(from, len as usize);
        other_vm_may_have_written();
        // SAFETY: `range` checked both ends. Races: see the module's top.
        unsafe { self.copies.copy_between(from.as_ptr(), to.as_ptr(), len as usize) };
        other_vm_may_have_written();
        other.wrote(to, len as usize, Wrote::Payload);
        Ok(())
    }

    /// Copies a few bytes in, whose number is known in advance.
    #[inline]
    pub fn write_array<const N: usize>(&self, offset: u64, from: &[u8; N]) -> Result<(), ShmError> {
        let to = self.range(offset, N as u64)?;
        other_vm_may_have_written();
        // SAFETY: as in `write`.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), to.as_ptr(), N) };
        other_vm_may_have_written();
        self.wrote(to, N, Wrote::Payload);
        Ok(())
    }

    /// Asks the processor for the cache line at an offset, which is about to be read. An offset
    /// outside of the memory is harmless.
    #[inline]
    pub fn prefetch_read(&self, offset: u64) {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            let at = self.base.as_ptr().wrapping_add(offset as usize);
            // SAFETY: it changes no memory and does not fault, whatever the address.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
        }
    }

    /// Asks the processor for the cache line at an offset, which is about to be written whole
    /// or in part. An offset outside of the memory is harmless.
    #[inline]
    pub fn prefetch_write(&self, offset: u64) {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        {
            let at = self.base.as_ptr().wrapping_add(offset as usize);
            // By name, as the intrinsic becomes a prefetch for reading where the compiler
            // does not know that the processor has this one. One that has not does nothing.
            // SAFETY: as in `prefetch_read`.
            unsafe {
                std::arch::asm!("prefetchw [{at}]", at = in(reg) at, options(nostack, preserves_flags, readonly));
            }
        }
    }

    /// Sets bytes to zero.
    pub fn zero(&self, offset: u64, len: u64) -> Result<(), ShmError> {
        let to = self.range(offset, len)?;
        other_vm_may_have_written();
        // SAFETY: `range` checked the target. Races: see the module's top.
        unsafe { ptr::write_bytes(to.as_ptr(), 0, len as usize) };
        other_vm_may_have_written();
        self.wrote(to, len as usize, Wrote::Payload);
        Ok(())
    }
}

/// One aligned 16-bit word, checked once, in what keeps its memory mapped.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SharedWord<K> {
    at: NonNull<u8>,
    keep: K,
}

/// What keeps a word mapped, and knows where stores to it are marked.
pub(crate) trait Keeps {
    /// The memory that the word is in.
    fn memory(&self) -> &SharedMemory;
}

impl Keeps for SharedMemory {
    #[inline(always)]
    fn memory(&self) -> &SharedMemory {
        self
    }
}

impl Keeps for &PackedSlots {
    #[inline(always)]
    fn memory(&self) -> &SharedMemory {
        &self.memory
    }
}

/// A ring's index or flags.
pub(crate) type Word16 = SharedWord<SharedMemory>;
/// The flags of a slot of a packed virtqueue.
pub(crate) type SlotFlags<'a> = SharedWord<&'a PackedSlots>;

// SAFETY: an address inside the memory that `keep` keeps, which is Send.
unsafe impl<K: Send> Send for SharedWord<K> {}
// SAFETY: accessed by atomics only.
unsafe impl<K: Sync> Sync for SharedWord<K> {}

impl Word16 {
    /// Checks bounds and alignment, once.
    pub(crate) fn new(memory: &SharedMemory, offset: u64) -> Result<Self, ShmError> {
        Ok(Self { at: memory.word(offset, 2)?, keep: memory.clone() })
    }
}

impl<K: Keeps> SharedWord<K> {
    #[inline]
    fn atomic(&self) -> &AtomicU16 {
        // SAFETY: `Word16::new` and `PackedSlots::flags`, who alone make one, checked bounds and
        // alignment, and `keep` keeps it mapped. An atomic may change under its reference.
        unsafe { AtomicU16::from_ptr(self.at.as_ptr().cast()) }
    }

    #[inline]
    pub(crate) fn load(&self, order: Ordering) -> u16 {
        trace::note(self.at, 2);
        u16::from_le(self.atomic().load(order))
    }

    #[inline]
    pub(crate) fn store(&self, value: u16, order: Ordering) {
        self.atomic().store(value.to_le(), order);
        self.keep.memory().wrote(self.at, 2, Wrote::Ring);
    }
}

/// An array of a power of two of `STRIDE`-byte slots, checked once: an available
/// ring (2), a used ring (8) or a descriptor table (16). Indices wrap, so that no
/// index is out of bounds.
#[derive(Clone, Debug)]
pub(crate) struct Slots<const STRIDE: usize> {
    base: NonNull<u8>,
    mask: u16,
    memory: SharedMemory,
}

// SAFETY: an address inside the memory that `memory` keeps, which is Send.
unsafe impl<const STRIDE: usize> Send for Slots<STRIDE> {}
// SAFETY: accessed by atomics only.
unsafe impl<const STRIDE: usize> Sync for Slots<STRIDE> {}

impl<const STRIDE: usize> Slots<STRIDE> {
    /// The largest access: 8 bytes for descriptors; used elements are 4-aligned.
    const ALIGN: usize = STRIDE / 2 + STRIDE % 4 / 2;

    /// Checks bounds and alignment of `count` slots from `offset` on, once.
    /// `count` is a power of two (others are rounded down).
    pub(crate) fn new(memory: &SharedMemory, offset: u64, count: u16) -> Result<Self, ShmError> {
        let count = 1_u16 << count.max(1).ilog2();
        let base = memory.range(offset, u64::from(count) * STRIDE as u64)?;
        if !base.addr().get().is_multiple_of(Self::ALIGN) {
            return Err(ShmError::Misaligned { offset, align: Self::ALIGN });
        }
        Ok(Self { base, mask: count - 1, memory: memory.clone() })
    }

    #[inline]
    fn slot(&self, index: u16) -> NonNull<u8> {
        // SAFETY: `mask` keeps the index below the count that `new` checked.
        unsafe { self.base.add(usize::from(index & self.mask) * STRIDE) }
    }
}

impl Slots<2> {
    #[inline]
    fn word(&self, index: u16) -> &AtomicU16 {
        // SAFETY: `slot` is in bounds, `new` checked the alignment, `memory` keeps it mapped. An
        // atomic may change under its reference.
        unsafe { self.slot(index).cast().as_ref() }
    }

    /// One relaxed load of the slot that `index` wraps to.
    #[inline]
    pub(crate) fn load(&self, index: u16) -> u16 {
        trace::note(self.slot(index), 2);
        // Relaxed: ordered by the acquire load of the ring's index before it.
        u16::from_le(self.word(index).load(Ordering::Relaxed))
    }

    /// One relaxed store to the slot that `index` wraps to.
    #[inline]
    pub(crate) fn store(&self, index: u16, value: u16) {
        // Relaxed: ordered by the release store of the ring's index after it.
        self.word(index).store(value.to_le(), Ordering::Relaxed);
        self.memory.wrote(self.slot(index), 2, Wrote::Ring);
    }
}

impl Slots<8> {
    #[inline]
    fn words(&self, index: u16) -> &[AtomicU32; 2] {
        // SAFETY: as `Slots<2>::word`; the slot has 8 bytes.
        unsafe { self.slot(index).cast().as_ref() }
    }

    /// Two relaxed loads: the halves of the slot that `index` wraps to.
    #[inline]
    pub(crate) fn load(&self, index: u16) -> [u32; 2] {
        trace::note(self.slot(index), 8);
        // Relaxed: ordered by the acquire load of the ring's index before it.
        self.words(index).each_ref().map(|word| u32::from_le(word.load(Ordering::Relaxed)))
    }

    /// Two relaxed stores to the slot that `index` wraps to.
    #[inline]
    pub(crate) fn store(&self, index: u16, halves: [u32; 2]) {
        for (half, word) in halves.into_iter().zip(self.words(index)) {
            // Relaxed: ordered by the release store of the ring's index after it.
            word.store(half.to_le(), Ordering::Relaxed);
        }
        self.memory.wrote(self.slot(index), 8, Wrote::Ring);
    }
}

impl Slots<16> {
    #[inline]
    fn words(&self, index: u16) -> &[AtomicU64; 2] {
        // SAFETY: as `Slots<2>::word`; the slot has 16 bytes.
        unsafe { self.slot(index).cast().as_ref() }
    }

    /// Two relaxed loads: the halves of the slot that `index` wraps to.
    #[inline]
    pub(crate) fn load(&self, index: u16) -> [u64; 2] {
        trace::note(self.slot(index), 16);
        // Relaxed: ordered by the acquire load of the ring's index before it.
        self.words(index).each_ref().map(|word| u64::from_le(word.load(Ordering::Relaxed)))
    }

    /// Two relaxed stores to the slot that `index` wraps to.
    #[inline]
    pub(crate) fn store(&self, index: u16, halves: [u64; 2]) {
        for (half, word) in halves.into_iter().zip(self.words(index)) {
            // Relaxed: ordered by the release store of the ring's index after it.
            word.store(half.to_le(), Ordering::Relaxed);
        }
        self.memory.wrote(self.slot(index), 16, Wrote::Ring);
    }
}

/// `struct pvirtq_desc` (virtio 1.3, 2.8.13).
#[repr(C)]
struct PackedSlot {
    addr: AtomicU64,
    len: AtomicU32,
    id: AtomicU16,
    flags: AtomicU16,
}

const _: () = assert!(size_of::<PackedSlot>() == PackedSlots::STRIDE && offset_of!(PackedSlot, flags) == 14);

/// The descriptors of a packed virtqueue (virtio 1.3, 2.8), checked once: an array of any
/// number of 16-byte slots. An index that is not below the count means the first slot.
#[derive(Clone, Debug)]
pub(crate) struct PackedSlots {
    base: NonNull<u8>,
    count: u16,
    /// An aligned store of 16 bytes is one store.
    at_once: bool,
    memory: SharedMemory,
}

// SAFETY: an address inside the memory that `memory` keeps, which is Send.
unsafe impl Send for PackedSlots {}
// SAFETY: accessed by atomics only.
unsafe impl Sync for PackedSlots {}

impl PackedSlots {
    const STRIDE: usize = 16;

    /// Checks bounds and alignment of `count` slots (at least one) from `offset` on, once.
    pub(crate) fn new(memory: &SharedMemory, offset: u64, count: u16) -> Result<Self, ShmError> {
        let count = count.max(1);
        let base = memory.range(offset, u64::from(count) * Self::STRIDE as u64)?;
        if !base.addr().get().is_multiple_of(Self::STRIDE) {
            return Err(ShmError::Misaligned { offset, align: Self::STRIDE });
        }
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        let at_once = std::arch::is_x86_feature_detected!("avx");
        #[cfg(not(all(target_arch = "x86_64", not(miri))))]
        let at_once = false;
        Ok(Self { base, count, at_once, memory: memory.clone() })
    }

    #[inline]
    fn slot(&self, index: u16) -> NonNull<u8> {
        let index = if index < self.count { index } else { 0 };
        // SAFETY: the index is below the count that `new` checked.
        unsafe { self.base.add(usize::from(index) * Self::STRIDE) }
    }

    #[inline]
    fn fields(&self, index: u16) -> &PackedSlot {
        // SAFETY: the slot has 16 bytes and is aligned to 16, see `new`; `memory` keeps it mapped.
        // Atomics may change under their reference.
        unsafe { self.slot(index).cast().as_ref() }
    }

    /// The word that says whose the slot is.
    #[inline]
    pub(crate) fn flags(&self, index: u16) -> SlotFlags<'_> {
        SharedWord { at: NonNull::from(&self.fields(index).flags).cast(), keep: self }
    }

    /// Relaxed loads of all but the flags: address, length, id.
    #[inline]
    pub(crate) fn load(&self, index: u16) -> (u64, u32, u16) {
        trace::note(self.slot(index), 14);
        let PackedSlot { addr, len, id, .. } = self.fields(index);
        // Relaxed: ordered by the acquire load of the flags before them.
        (
            u64::from_le(addr.load(Ordering::Relaxed)),
            u32::from_le(len.load(Ordering::Relaxed)),
            u16::from_le(id.load(Ordering::Relaxed)),
        )
    }

    /// Relaxed store of the address.
    #[inline]
    pub(crate) fn store_addr(&self, index: u16, addr: u64) {
        // Relaxed: ordered by the release store of the flags after it.
        self.fields(index).addr.store(addr.to_le(), Ordering::Relaxed);
        self.memory.wrote(self.slot(index), 8, Wrote::Ring);
    }

    /// One store of length, id and flags together: whoever dies before or after it leaves the
    /// slot as it was, or complete.
    #[inline]
    pub(crate) fn store_rest(&self, index: u16, len: u32, id: u16, flags: u16, order: Ordering) {
        let rest = u64::from(len) | u64::from(id) << 32 | u64::from(flags) << 48;
        // SAFETY: the slot has 16 bytes and is aligned to 16, see `new`.
        let word = unsafe { AtomicU64::from_ptr(self.slot(index).as_ptr().add(8).cast()) };
        word.store(rest.to_le(), order);
        self.memory.wrote(self.slot(index), Self::STRIDE, Wrote::Ring);
    }

    /// The same of the whole slot, address included, where the processor can: elsewhere the address
    /// comes first, and whoever dies between the two leaves a slot that is neither.
    #[inline]
    pub(crate) fn store_whole(&self, index: u16, addr: u64, rest: (u32, u16, u16), order: Ordering) {
        let (len, id, flags) = rest;
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        if self.at_once {
            use std::arch::x86_64::_mm_set_epi64x;
            let rest = u64::from(len) | u64::from(id) << 32 | u64::from(flags) << 48;
            // SAFETY: the slot has 16 bytes and is aligned to 16, see `new`. With AVX that makes it
            // one store, whatever else looks on (Intel's manual, volume 3, 9.1.1; AMD's, volume 2,
            // 7.3.2). Each store of this processor is a release, and the compiler, which does not
            // know what the block writes, moves no access across it.
            unsafe {
                std::arch::asm!(
                    "movdqa xmmword ptr [{at}], {value}",
                    at = in(reg) self.slot(index).as_ptr(),
                    value = in(xmm_reg) _mm_set_epi64x(rest as i64, addr as i64),
                    options(nostack, preserves_flags),
                );
            }
            self.memory.wrote(self.slot(index), Self::STRIDE, Wrote::Ring);
            return;
        }
        self.store_addr(index, addr);
        self.store_rest(index, len, id, flags, order);
    }
}

/// Which shared bytes were fetched: lets unit tests prove that none is fetched twice.
#[cfg(not(test))]
mod trace {
    #[inline(always)]
    pub(super) fn note(_at: std::ptr::NonNull<u8>, _len: usize) {}
}

#[cfg(test)]
pub(crate) mod trace {
    use std::cell::RefCell;
    use std::ptr::NonNull;

    thread_local! {
        static FETCHED: RefCell<Option<Vec<(usize, usize)>>> = const { RefCell::new(None) };
    }

    pub(super) fn note(at: NonNull<u8>, len: usize) {
        FETCHED.with_borrow_mut(|fetched| {
            if let Some(list) = fetched {
                list.push((at.addr().get(), len));
            }
        });
    }

    /// Runs `body` and returns the ranges (address, bytes) that this thread fetched.
    pub(crate) fn fetches_of<R>(body: impl FnOnce() -> R) -> (R, Vec<(usize, usize)>) {
        FETCHED.set(Some(Vec::new()));
        let result = body();
        (result, FETCHED.take().unwrap_or_default())
    }
}
