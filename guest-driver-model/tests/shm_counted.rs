//! What `vf` says of bytes that it copied would be 0 whatever it did, if nothing counted: what counts does, and
//! what does not. The count is the whole process's, so this has a program of its own.
#![allow(clippy::unwrap_used, missing_docs)]

use guest_driver_model::shm::SharedMemory;

/// Bytes counted while something is done.
fn counted(mut body: impl FnMut()) -> u64 {
    let before = SharedMemory::counted_bytes();
    body();
    SharedMemory::counted_bytes() - before
}

#[test]
fn each_byte_that_is_copied_of_a_memory_that_counts_is_counted() {
    let silent = SharedMemory::private(64 << 10).unwrap();
    let counts = silent.counted();
    // Short ones, and such as take other instructions.
    for len in [1, 63, 64, 300, 5000] {
        let mut bytes = vec![7; len];
        let len = len as u64;
        assert_eq!(counted(|| counts.write(100, &bytes).unwrap()), len);
        assert_eq!(counted(|| counts.read(100, &mut bytes).unwrap()), len);
        assert_eq!(counted(|| counts.copy_to(100, &silent, 20_000, len).unwrap()), len);
        assert_eq!(counted(|| counts.clone().part(64, 30_000).unwrap().write(0, &bytes).unwrap()), len);
        for other in [&silent, &counts.uncounted()] {
            assert_eq!(counted(|| other.write(100, &bytes).unwrap()), 0);
            assert_eq!(counted(|| other.read(100, &mut bytes).unwrap()), 0);
            assert_eq!(counted(|| other.copy_to(100, &silent, 20_000, len).unwrap()), 0);
        }
    }
    assert_eq!(counted(|| assert_eq!(counts.read_array(0), Ok([0_u8; 12]))), 12);
    assert_eq!(counted(|| counts.store_u16(10, 1).unwrap()), 0, "a word is no packet");
}
