//! Front-ends that send nonsense to a running broker, byte by byte: each is a
//! counted fault on its own link, and nothing else is touched.
//!
//! | file | what it holds |
//! |---|---|
//! | `raw` | a front-end that writes its own bytes |
//! | `bench` | a broker with three links, one of them for a disk, its log, its descriptors |
//! | `faults` | every malformed thing, one by one |
//! | `stalls` | sessions that stop in the middle |
//! | `answers` | wrong answers to each request on a back-end channel |
//! | `descriptors` | too many descriptors, and of the wrong kinds |
//! | `dirty_log` | dirty logs that pages cannot be marked in |
//! | `disk` | the configuration space of a disk |
//! | `full_eventfd` | a call on which a write would block |
//! | `iommu_owner` | an owner with an IOMMU, and a peer's driver that gives commands |
//! | `iommu` | what such an owner can do wrong |
//! | `takeover` | an owner that is migrated in the middle of a question |
//! | `cve` | what other back-ends of vhost-user got wrong, by name |
//! | `random` | thousands of short sessions of random bytes |
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "bad_input/answers.rs"]
mod answers;
#[path = "bad_input/bench.rs"]
mod bench;
#[path = "bad_input/cve.rs"]
mod cve;
#[path = "bad_input/descriptors.rs"]
mod descriptors;
#[path = "bad_input/dirty_log.rs"]
mod dirty_log;
#[path = "bad_input/disk.rs"]
mod disk;
#[path = "bad_input/faults.rs"]
mod faults;
#[path = "bad_input/full_eventfd.rs"]
mod full_eventfd;
#[path = "bad_input/iommu.rs"]
mod iommu;
#[path = "bad_input/iommu_owner.rs"]
mod iommu_owner;
#[path = "bad_input/lingering.rs"]
mod lingering;
#[path = "bad_input/random.rs"]
mod random;
#[path = "bad_input/raw.rs"]
mod raw;
#[path = "bad_input/stalls.rs"]
mod stalls;
#[path = "bad_input/takeover.rs"]
mod takeover;
