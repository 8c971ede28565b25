//! The register state machine, by tables.

use super::*;

const STATUS: u64 = 20;

fn write(common: &mut Common, at: u64, value: u32, width: usize) -> Change {
    common.write(at, &value.to_le_bytes()[..width])
}

fn read(common: &Common, at: u64, width: usize) -> u32 {
    let mut bytes = [0; 4];
    common.read(at, &mut bytes[..width]);
    u32::from_le_bytes(bytes)
}

fn accept(common: &mut Common, features: u64) {
    for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
        write(common, 8, select, 4);
        write(common, 12, half, 4);
    }
}

#[test]
fn fields_cover_the_structure_without_gap_or_overlap() {
    let end = FIELDS.iter().fold(0, |end, (at, width, _)| {
        assert_eq!(*at, end);
        end + width
    });
    assert_eq!(end, LEN);
}

#[test]
fn features_decide_whether_features_ok_stays() {
    let version = 1 << 32;
    let platform = 1 << 33;
    for (features, stays) in [
        (version, true),
        (version | platform, true),
        (0, false),
        (platform, false),
        (version | 1, false),
        (version | 1 << 40, false),
        (version | 1 << 30, false),
    ] {
        let mut common = Common::new(3, 4);
        write(&mut common, STATUS, 3, 1);
        accept(&mut common, features);
        write(&mut common, STATUS, 11, 1);
        assert_eq!(read(&common, STATUS, 1) & 8 != 0, stays, "{features:#x}");
        let change = write(&mut common, STATUS, 15, 1);
        assert_eq!(change == Change::Started, stays);
        assert_eq!(common.is_live(), stays);
    }
}

#[test]
fn a_device_starts_once_and_keeps_its_features() {
    let mut common = Common::new(3, 4);
    accept(&mut common, OFFERED);
    assert_eq!(write(&mut common, STATUS, 15, 1), Change::Started);
    assert_eq!(write(&mut common, STATUS, 15, 1), Change::None);
    accept(&mut common, 0);
    assert_eq!(common.driver_features, OFFERED);
    assert_eq!(write(&mut common, STATUS, 4, 1), Change::None);
    assert_eq!(read(&common, STATUS, 1), 15, "no bit is cleared but by a reset");
    assert_eq!(write(&mut common, STATUS, 64, 1), Change::None);
    assert_eq!(read(&common, STATUS, 1), 15, "NEEDS_RESET is the device's");
    assert!(common.fail());
    assert_eq!(read(&common, STATUS, 1), 15 | 64);
    assert_eq!(write(&mut common, STATUS, 0, 1), Change::Reset);
    common.reset();
    assert_eq!(read(&common, STATUS, 1), 0);
}

#[test]
fn offered_features_are_read_by_halves() {
    let mut common = Common::new(3, 4);
    for (select, value) in [(0, 0), (1, 3), (2, 0), (u32::MAX, 0)] {
        write(&mut common, 0, select, 4);
        assert_eq!(read(&common, 4, 4), value);
    }
}

#[test]
fn queues_keep_what_makes_sense() {
    let mut common = Common::new(3, 4);
    assert_eq!(read(&common, 18, 2), 3);
    write(&mut common, 22, 2, 2);
    assert_eq!((read(&common, 24, 2), read(&common, 30, 2)), (256, 2));
    for (size, kept) in [(8, 8), (0, 8), (7, 8), (512, 8), (16, 16)] {
        write(&mut common, 24, size, 2);
        assert_eq!(read(&common, 24, 2), kept);
    }
    for (vector, kept) in [(3, 3), (4, 0xffff), (0, 0), (0xffff, 0xffff)] {
        assert_eq!(write(&mut common, 26, vector, 2), Change::Vectors);
        assert_eq!(read(&common, 26, 2), kept);
    }
    common.write(32, &0x1234_5678_9abc_d000_u64.to_le_bytes());
    assert_eq!(read(&common, 36, 4), 0x1234_5678);
    write(&mut common, 28, 1, 2);
    assert_eq!(read(&common, 28, 2), 1);
    write(&mut common, 28, 0, 2);
    write(&mut common, 24, 4, 2);
    write(&mut common, 36, 0, 4);
    assert_eq!((read(&common, 28, 2), read(&common, 24, 2), read(&common, 36, 4)), (1, 16, 0x1234_5678));
    write(&mut common, 22, 3, 2);
    let absent = [24, 28, 30, 32].map(|at| read(&common, at, 2));
    assert_eq!((absent, read(&common, 26, 2)), ([0; 4], 0xffff));
    assert_eq!(write(&mut common, 28, 1, 2), Change::None);
}

#[test]
fn registers_are_written_whole_or_not_at_all() {
    let mut common = Common::new(3, 4);
    common.write(22, &[1]);
    common.write(23, &[1]);
    assert_eq!(read(&common, 22, 2), 0);
    // queue_select and queue_size by one access.
    common.write(22, &[1, 0, 8, 0]);
    assert_eq!((read(&common, 22, 2), read(&common, 24, 2)), (1, 8));
    common.write(u64::MAX, &[1; 8]);
    common.write(55, &[1; 8]);
    let mut data = [9; 8];
    common.read(u64::MAX, &mut data);
    assert_eq!(data, [0; 8]);
}
