//! The IOMMU's requests against plain sets of bytes: what each endpoint reaches, what
//! each request answers, and a follower that knows only the changes it was told.

use std::collections::BTreeMap;

use iommu::virtio_iommu::{Change, EndpointId, Iommu, Settings, Status, wire};
use iommu::{Access, Iova};
use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop_oneof};
use proptest::test_runner::TestCaseError;
use proptest::{collection::vec, prop_assert, prop_assert_eq, proptest};
use zerocopy::IntoBytes;

use crate::units;

const ENDPOINTS: u32 = 3;
const MAX_MAPPINGS: usize = 6;

#[derive(Clone, Copy, Debug)]
enum Step {
    Attach { endpoint: u32, domain: u32, flags: u32 },
    Detach { endpoint: u32, domain: u32 },
    Map { domain: u32, start: u64, end: u64, phys: u64, flags: u32 },
    Unmap { domain: u32, start: u64, end: u64 },
    SetBypass(bool),
    Reset,
}

/// Addresses near the bottom and the top.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![3 => 0..20u64, 1 => (0..20u64).prop_map(|below| u64::MAX - below)]
}

fn span() -> impl Strategy<Value = (u64, u64)> {
    prop_oneof![
        4 => (address(), 0..6u64).prop_map(|(start, reach)| (start, start.saturating_add(reach))),
        1 => (address(), address()),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let (domain, endpoint) = (0..3u32, 0..ENDPOINTS + 1);
    let flags = prop_oneof![5 => Just(0), 2 => Just(1), 1 => Just(2u32)];
    prop_oneof![
        4 => (endpoint.clone(), domain.clone(), flags)
            .prop_map(|(endpoint, domain, flags)| Step::Attach { endpoint, domain, flags }),
        1 => (endpoint, domain.clone()).prop_map(|(endpoint, domain)| Step::Detach { endpoint, domain }),
        8 => (domain.clone(), span(), address(), prop_oneof![9 => 0..8u32, 1 => Just(8)]).prop_map(
            |(domain, (start, end), phys, flags)| Step::Map { domain, start, end, phys, flags }
        ),
        3 => (domain, span()).prop_map(|(domain, (start, end))| Step::Unmap { domain, start, end }),
        1 => any::<bool>().prop_map(Step::SetBypass),
        1 => Just(Step::Reset),
    ]
}

/// A byte of a domain: the mapping it came with, where it leads, the flags.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Byte {
    mapping: usize,
    gpa: u64,
    flags: u32,
}

impl Byte {
    fn access(self) -> Option<Access> {
        if self.flags & 4 != 0 { None } else { Access::from_bits(self.flags & 3) }
    }
}

/// Bytes by address; `None` for a bypass domain.
type Space = Option<BTreeMap<u64, Byte>>;

#[derive(Clone, Debug, Default)]
struct Model {
    bypass: bool,
    /// By endpoint.
    domain_of: BTreeMap<u32, u32>,
    spaces: BTreeMap<u32, Space>,
    mappings: usize,
}

impl Model {
    fn sweep(&mut self) {
        let used: Vec<u32> = self.domain_of.values().copied().collect();
        self.spaces.retain(|domain, _| used.contains(domain));
    }

    fn count(&self) -> usize {
        let count = |bytes: &BTreeMap<u64, Byte>| {
            let mut numbers: Vec<usize> = bytes.values().map(|byte| byte.mapping).collect();
            numbers.sort_unstable();
            numbers.dedup();
            numbers.len()
        };
        self.spaces.values().flatten().map(count).sum()
    }

    fn apply(&mut self, step: Step) -> Result<(), Status> {
        match step {
            Step::Attach { endpoint, domain, flags } => {
                if flags > 1 {
                    return Err(Status::Inval);
                }
                if endpoint >= ENDPOINTS {
                    return Err(Status::NoEnt);
                }
                let new = (flags == 0).then(BTreeMap::new);
                match self.spaces.get(&domain) {
                    Some(space) if space.is_some() != new.is_some() => return Err(Status::Inval),
                    Some(_) => {}
                    None => drop(self.spaces.insert(domain, new)),
                }
                self.domain_of.insert(endpoint, domain);
                self.sweep();
            }
            Step::Detach { endpoint, domain } => {
                if endpoint >= ENDPOINTS {
                    return Err(Status::NoEnt);
                }
                if self.domain_of.get(&endpoint) != Some(&domain) {
                    return Err(Status::Inval);
                }
                self.domain_of.remove(&endpoint);
                self.sweep();
            }
            Step::Map { domain, start, end, phys, flags } => {
                if flags > 7 {
                    return Err(Status::Inval);
                }
                let count = self.count();
                let space = self.spaces.get_mut(&domain).ok_or(Status::NoEnt)?;
                let bytes = space.as_mut().ok_or(Status::Inval)?;
                if end < start {
                    return Err(Status::Inval);
                }
                if u128::from(phys) + u128::from(end - start) >= 1 << 64 || end - start == u64::MAX {
                    return Err(Status::Range);
                }
                if bytes.range(start..=end).next().is_some() {
                    return Err(Status::Inval);
                }
                if count == MAX_MAPPINGS {
                    return Err(Status::NoMem);
                }
                self.mappings += 1;
                for offset in 0..=end - start {
                    let byte = Byte { mapping: self.mappings, gpa: phys + offset, flags };
                    bytes.insert(start + offset, byte);
                }
            }
            Step::Unmap { domain, start, end } => {
                let space = self.spaces.get_mut(&domain).ok_or(Status::NoEnt)?;
                let bytes = space.as_mut().ok_or(Status::Inval)?;
                if end < start {
                    return Err(Status::Inval);
                }
                let hit: Vec<usize> = bytes.range(start..=end).map(|(_, byte)| byte.mapping).collect();
                let inside = |at: &u64| (start..=end).contains(at);
                if bytes.iter().any(|(at, byte)| hit.contains(&byte.mapping) && !inside(at)) {
                    return Err(Status::Range);
                }
                bytes.retain(|at, _| !inside(at));
            }
            Step::SetBypass(bypass) => self.bypass = bypass,
            Step::Reset => {
                self.domain_of.clear();
                self.sweep();
            }
        }
        Ok(())
    }

    fn bypassed(&self, endpoint: u32) -> bool {
        match self.domain_of.get(&endpoint) {
            None => self.bypass,
            Some(domain) => self.spaces[domain].is_none(),
        }
    }

    /// What an endpoint reaches by translation.
    fn reached(&self, endpoint: u32) -> BTreeMap<u64, (u64, Access)> {
        let space = self.domain_of.get(&endpoint).and_then(|domain| self.spaces[domain].as_ref());
        let bytes = space.into_iter().flatten();
        bytes.filter_map(|(at, byte)| Some((*at, (byte.gpa, byte.access()?)))).collect()
    }
}

/// Who knows only the changes.
#[derive(Clone, Debug, Default)]
struct Follower {
    bypassed: BTreeMap<u32, bool>,
    bytes: BTreeMap<u32, BTreeMap<u64, (u64, Access)>>,
}

impl Follower {
    fn follow(&mut self, change: Change) -> Result<(), TestCaseError> {
        match change {
            Change::Mapped { endpoint, iova, gpa, access } => {
                let bytes = self.bytes.entry(endpoint.0).or_default();
                for offset in 0..iova.len() {
                    let old = bytes.insert(iova.start().raw() + offset, (gpa.raw() + offset, access));
                    prop_assert!(old.is_none(), "mapped over a mapping");
                }
            }
            Change::Unmapped { endpoint, iova } => {
                let bytes = self.bytes.entry(endpoint.0).or_default();
                for offset in 0..iova.len() {
                    let old = bytes.remove(&(iova.start().raw() + offset));
                    prop_assert!(old.is_some(), "unmapped what was not mapped");
                }
            }
            Change::BypassOn { endpoint } => {
                prop_assert_ne(self.bypassed.insert(endpoint.0, true), Some(true))?;
            }
            Change::BypassOff { endpoint } => {
                prop_assert_ne(self.bypassed.insert(endpoint.0, false), None)?;
            }
        }
        Ok(())
    }
}

fn prop_assert_ne(left: Option<bool>, right: Option<bool>) -> Result<(), TestCaseError> {
    prop_assert!(left != right, "bypass changed to what it was");
    Ok(())
}

fn send(iommu: &mut Iommu, step: Step) -> (Result<(), Status>, Vec<Change>) {
    let request = match step {
        Step::Attach { endpoint, domain, flags } => {
            wire::ReqAttach::new(domain, endpoint, flags).as_bytes().to_vec()
        }
        Step::Detach { endpoint, domain } => wire::ReqDetach::new(domain, endpoint).as_bytes().to_vec(),
        Step::Map { domain, start, end, phys, flags } => {
            wire::ReqMap::new(domain, start..=end, phys, flags).as_bytes().to_vec()
        }
        Step::Unmap { domain, start, end } => wire::ReqUnmap::new(domain, start..=end).as_bytes().to_vec(),
        Step::SetBypass(bypass) => return (Ok(()), iommu.set_bypass(bypass)),
        Step::Reset => return (Ok(()), iommu.reset()),
    };
    let outcome = iommu.request(&request, 4);
    let status = match outcome.status().unwrap() {
        Status::Ok => Ok(()),
        status => Err(status),
    };
    (status, outcome.changes)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn the_iommu_is_a_table_of_bytes_for_each_domain(
        steps in vec(step(), 1..50),
        lookups in vec((0..ENDPOINTS, address(), 0..8u64, 1..4u32), 16),
    ) {
        let settings = Settings { page_size_mask: 1, max_mappings: MAX_MAPPINGS, ..Settings::default() };
        let mut iommu = Iommu::new(settings);
        for endpoint in 0..ENDPOINTS {
            iommu.add_endpoint(EndpointId(endpoint), Vec::new()).unwrap();
        }
        let mut model = Model::default();
        let mut follower = Follower::default();
        for step in steps {
            // A mapping of nearly everything is no sum of bytes to be counted here.
            if matches!(step, Step::Map { start, end, .. } if end > start && end - start > 100) {
                continue;
            }
            let (status, changes) = send(&mut iommu, step);
            prop_assert_eq!(status, model.apply(step), "{:?}", step);
            prop_assert!(status.is_ok() || changes.is_empty());
            for change in changes {
                follower.follow(change)?;
            }
            for endpoint in 0..ENDPOINTS {
                let told = follower.bytes.entry(endpoint).or_default();
                prop_assert_eq!(told, &model.reached(endpoint));
                let bypassed = follower.bypassed.get(&endpoint) == Some(&true);
                prop_assert_eq!(bypassed, model.bypassed(endpoint));
                prop_assert_eq!(iommu.is_bypassed(EndpointId(endpoint)), bypassed);
            }
        }
        for (endpoint, start, len, wanted) in lookups {
            let wanted = Access::from_bits(wanted).unwrap();
            let found = iommu.translate(EndpointId(endpoint), Iova::new(start), len, wanted);
            let found = found.ok().map(|pieces| {
                pieces.iter().flat_map(|piece| {
                    units(piece.start().raw(), piece.len(), 1).unwrap()
                }).collect::<Vec<_>>()
            });
            let reached = model.reached(endpoint);
            let gpa = |at: u128| {
                if model.bypassed(endpoint) {
                    return Some(at);
                }
                let (gpa, access) = reached.get(&u64::try_from(at).unwrap())?;
                access.allows(wanted).then_some(u128::from(*gpa))
            };
            let expected = units(start, len, 1).and_then(|bytes| bytes.into_iter().map(gpa).collect());
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn no_bytes_are_too_strange_a_request(
        requests in vec((vec(any::<u8>(), 0..80), 0..20usize), 1..30),
        kinds in vec(0..7u8, 30),
    ) {
        let mut iommu = Iommu::new(Settings { page_size_mask: 1, ..Settings::default() });
        for endpoint in 0..ENDPOINTS {
            iommu.add_endpoint(EndpointId(endpoint), Vec::new()).unwrap();
        }
        for ((mut request, writable), kind) in requests.into_iter().zip(kinds) {
            if let Some(first) = request.first_mut() {
                *first = kind;
            }
            let outcome = iommu.request(&request, writable);
            prop_assert!(outcome.response.len() <= writable);
            prop_assert!(outcome.response.is_empty() == outcome.status().is_none());
        }
    }
}
