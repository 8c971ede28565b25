//! The device: what each request does (virtio 1.3, 5.13.6), which endpoint is where,
//! and where an endpoint's access leads. Nothing here waits, and a request that is
//! refused has changed nothing.

use std::collections::{BTreeMap, BTreeSet};

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::domain::{Domain, Mapping, Reached};
use super::outcome::{Change, Fault, FaultReason, Outcome, Untranslated};
use super::probe::{Reserved, properties};
use super::settings::{DomainId, EndpointError, EndpointId, Settings};
use super::wire::{
    Config, ReqAttach, ReqDetach, ReqHead, ReqMap, ReqProbe, ReqTail, ReqUnmap, Status,
    VIRTIO_IOMMU_ATTACH_F_BYPASS, VIRTIO_IOMMU_F_BYPASS_CONFIG, VIRTIO_IOMMU_F_DOMAIN_RANGE,
    VIRTIO_IOMMU_F_INPUT_RANGE, VIRTIO_IOMMU_F_MAP_UNMAP, VIRTIO_IOMMU_F_MMIO, VIRTIO_IOMMU_F_PROBE,
    VIRTIO_IOMMU_MAP_F_MMIO, VIRTIO_IOMMU_MAP_F_READ, VIRTIO_IOMMU_MAP_F_WRITE, VIRTIO_IOMMU_T_ATTACH,
    VIRTIO_IOMMU_T_DETACH, VIRTIO_IOMMU_T_MAP, VIRTIO_IOMMU_T_PROBE, VIRTIO_IOMMU_T_UNMAP,
};
use crate::address::{Gpa, Iova, Span};
use crate::map::Access;

#[derive(Clone, Debug, Default)]
struct Endpoint {
    reserved: Vec<Reserved>,
    domain: Option<DomainId>,
}

#[derive(Clone, Debug)]
struct Members {
    space: Domain,
    /// Never empty.
    endpoints: BTreeSet<EndpointId>,
}

/// The device (5.13). A driver that is hostile harms nothing but its own endpoints,
/// and takes no more memory than `max_mappings` allow.
#[derive(Clone, Debug)]
pub struct Iommu {
    settings: Settings,
    /// As the driver may have set it.
    bypass: bool,
    endpoints: BTreeMap<EndpointId, Endpoint>,
    domains: BTreeMap<DomainId, Members>,
}

type Answer = Result<Vec<Change>, Status>;

impl Iommu {
    /// A device without endpoints.
    pub fn new(mut settings: Settings) -> Self {
        if settings.page_size_mask == 0 {
            settings.page_size_mask = Settings::default().page_size_mask;
        }
        let bypass = settings.bypass;
        Self { settings, bypass, endpoints: BTreeMap::new(), domains: BTreeMap::new() }
    }

    /// Adds an endpoint, in no domain. Nothing can be mapped for it in `reserved`.
    pub fn add_endpoint(
        &mut self,
        id: EndpointId,
        reserved: Vec<Reserved>,
    ) -> Result<Vec<Change>, EndpointError> {
        if self.endpoints.contains_key(&id) {
            return Err(EndpointError::Exists(id));
        }
        let apart = reserved.iter().enumerate().all(|(at, one)| {
            !one.range.is_empty() && !reserved.iter().skip(at + 1).any(|other| other.overlaps(&one.range))
        });
        if !apart || reserved.iter().filter(|one| one.msi).count() > 1 {
            return Err(EndpointError::Reserved(id));
        }
        let (needed, probe_size) = (reserved.len() * Reserved::LEN, self.settings.probe_size);
        if needed > probe_size as usize && probe_size != 0 {
            return Err(EndpointError::ProbeSize { endpoint: id, needed, probe_size });
        }
        self.endpoints.insert(id, Endpoint { reserved, domain: None });
        Ok(self.bypass.then_some(Change::BypassOn { endpoint: id }).into_iter().collect())
    }

    /// The virtio features to offer, besides those of the transport.
    pub fn features(&self) -> u64 {
        1 << VIRTIO_IOMMU_F_INPUT_RANGE
            | 1 << VIRTIO_IOMMU_F_DOMAIN_RANGE
            | 1 << VIRTIO_IOMMU_F_MAP_UNMAP
            | 1 << VIRTIO_IOMMU_F_BYPASS_CONFIG
            | u64::from(self.settings.probe_size != 0) << VIRTIO_IOMMU_F_PROBE
            | u64::from(self.settings.mmio) << VIRTIO_IOMMU_F_MMIO
    }

    /// The config space (5.13.4).
    pub fn config(&self) -> Config {
        let Settings { input_range, domain_range, .. } = &self.settings;
        Config {
            page_size_mask: U64::new(self.settings.page_size_mask),
            input_start: U64::new(*input_range.start()),
            input_end: U64::new(*input_range.end()),
            domain_start: U32::new(*domain_range.start()),
            domain_end: U32::new(*domain_range.end()),
            probe_size: U32::new(self.settings.probe_size),
            bypass: u8::from(self.bypass),
            reserved: [0; 3],
        }
    }

    /// The driver has written `bypass` of the config space.
    pub fn set_bypass(&mut self, bypass: bool) -> Vec<Change> {
        if std::mem::replace(&mut self.bypass, bypass) == bypass {
            return Vec::new();
        }
        let unattached = self.endpoints.iter().filter(|(_, endpoint)| endpoint.domain.is_none());
        let change = |(id, _): (&EndpointId, &Endpoint)| match bypass {
            true => Change::BypassOn { endpoint: *id },
            false => Change::BypassOff { endpoint: *id },
        };
        unattached.map(change).collect()
    }

    /// The driver has reset the device: every endpoint leaves its domain. `bypass`
    /// stays as it is (5.13.4.2).
    pub fn reset(&mut self) -> Vec<Change> {
        let ids: Vec<EndpointId> = self.endpoints.keys().copied().collect();
        ids.into_iter().flat_map(|id| self.move_endpoint(id, None)).collect()
    }

    /// Carries out a request: the bytes of the buffer's readable part, and the length
    /// of its writable part. Bytes behind the request's own are not looked at.
    pub fn request(&mut self, readable: &[u8], writable_len: usize) -> Outcome {
        let Ok((head, _)) = ReqHead::read_from_prefix(readable) else { return Outcome::default() };
        let answer = match head.kind {
            // 5.13.6: without room for the tail, nothing is written; nor done.
            _ if writable_len < size_of::<ReqTail>() => None,
            VIRTIO_IOMMU_T_ATTACH => parse(readable).map(|request| self.attach(request)),
            VIRTIO_IOMMU_T_DETACH => parse(readable).map(|request| self.detach(request)),
            VIRTIO_IOMMU_T_MAP => parse(readable).map(|request| self.map(request)),
            VIRTIO_IOMMU_T_UNMAP => parse(readable).map(|request| self.unmap(request)),
            VIRTIO_IOMMU_T_PROBE if self.settings.probe_size != 0 => {
                return match parse(readable) {
                    Some(request) => self.probe(request, writable_len),
                    None => Outcome::default(),
                };
            }
            // 5.13.6.2: of a type that is not known, the used length is 0.
            _ => None,
        };
        match answer {
            None => Outcome::default(),
            Some(Ok(changes)) => Outcome { response: tail(Status::Ok), changes },
            Some(Err(status)) => Outcome { response: tail(status), changes: Vec::new() },
        }
    }

    /// 5.13.6.3.2.
    fn attach(&mut self, request: ReqAttach) -> Answer {
        let flags = request.flags.get();
        if request.reserved != [0; 4] || flags & !VIRTIO_IOMMU_ATTACH_F_BYPASS != 0 {
            return Err(Status::Inval);
        }
        let bypass = flags & VIRTIO_IOMMU_ATTACH_F_BYPASS != 0;
        let (id, domain) = (EndpointId(request.endpoint.get()), DomainId(request.domain.get()));
        let endpoint = self.endpoints.get(&id).ok_or(Status::NoEnt)?;
        if !self.settings.domain_range.contains(&domain.0) {
            return Err(Status::Range);
        }
        if let Some(members) = self.domains.get(&domain) {
            if members.space.is_bypass() != bypass {
                return Err(Status::Inval);
            }
            if endpoint.domain == Some(domain) {
                return Ok(Vec::new());
            }
            // What is mapped there cannot be mapped for this endpoint.
            if endpoint.reserved.iter().any(|reserved| members.space.touches(&reserved.range)) {
                return Err(Status::Unsupp);
            }
        }
        Ok(self.move_endpoint(id, Some((domain, bypass))))
    }

    /// 5.13.6.4.2.
    fn detach(&mut self, request: ReqDetach) -> Answer {
        let (id, domain) = (EndpointId(request.endpoint.get()), DomainId(request.domain.get()));
        let endpoint = self.endpoints.get(&id).ok_or(Status::NoEnt)?;
        if endpoint.domain != Some(domain) {
            return Err(Status::Inval);
        }
        Ok(self.move_endpoint(id, None))
    }

    /// 5.13.6.5.2.
    fn map(&mut self, request: ReqMap) -> Answer {
        let flags = request.flags.get();
        let mmio = if self.settings.mmio { VIRTIO_IOMMU_MAP_F_MMIO } else { 0 };
        if flags & !(VIRTIO_IOMMU_MAP_F_READ | VIRTIO_IOMMU_MAP_F_WRITE | mmio) != 0 {
            return Err(Status::Inval);
        }
        let all: usize = self.domains.values().map(|members| members.space.len()).sum();
        let members = self.domains.get_mut(&DomainId(request.domain.get())).ok_or(Status::NoEnt)?;
        if members.space.is_bypass() {
            return Err(Status::Inval);
        }
        let [start, end, phys] = [request.virt_start, request.virt_end, request.phys_start].map(U64::get);
        let reach = end.checked_sub(start).ok_or(Status::Inval)?;
        // The lowest bit is there: the mask is not 0.
        let granularity = self.settings.page_size_mask & self.settings.page_size_mask.wrapping_neg();
        let aligned = |address: u64| address & (granularity - 1) == 0;
        if !aligned(start) || !aligned(phys) || !aligned(end.wrapping_add(1)) {
            return Err(Status::Range);
        }
        let input = &self.settings.input_range;
        if !input.contains(&start) || !input.contains(&end) || phys.checked_add(reach).is_none() {
            return Err(Status::Range);
        }
        let range = start..=end;
        let reserved = members.endpoints.iter().filter_map(|id| self.endpoints.get(id));
        if reserved.flat_map(|endpoint| &endpoint.reserved).any(|reserved| reserved.overlaps(&range)) {
            return Err(Status::Inval);
        }
        // Only the whole address space is no span: more than there can be memory for.
        let len = reach.checked_add(1).ok_or(Status::Range)?;
        let iova = Span::new(Iova::new(start), len).map_err(|_| Status::Range)?;
        let mapping = Mapping { iova, gpa: Gpa::new(phys), flags };
        if members.space.touches(&range) {
            return Err(Status::Inval);
        }
        if all >= self.settings.max_mappings {
            return Err(Status::NoMem);
        }
        members.space.map(mapping)?;
        Ok(members.endpoints.iter().filter_map(|id| mapped(*id, &mapping)).collect())
    }

    /// 5.13.6.6.2.
    fn unmap(&mut self, request: ReqUnmap) -> Answer {
        if request.reserved != [0; 4] {
            return Err(Status::Inval);
        }
        let members = self.domains.get_mut(&DomainId(request.domain.get())).ok_or(Status::NoEnt)?;
        let (start, end) = (request.virt_start.get(), request.virt_end.get());
        if members.space.is_bypass() || end < start {
            return Err(Status::Inval);
        }
        let removed = members.space.unmap(&(start..=end))?;
        let changes = removed
            .iter()
            .flat_map(|mapping| members.endpoints.iter().filter_map(|id| unmapped(*id, mapping)));
        Ok(changes.collect())
    }

    /// 5.13.6.7.2.
    fn probe(&self, request: ReqProbe, writable_len: usize) -> Outcome {
        let properties_len = self.settings.probe_size as usize;
        let len = (properties_len + size_of::<ReqTail>()).min(writable_len);
        let mut response = vec![0; len];
        let status = match self.endpoints.get(&EndpointId(request.endpoint.get())) {
            None => Status::NoEnt,
            Some(_) if len < properties_len + size_of::<ReqTail>() => Status::Inval,
            Some(endpoint) => {
                let properties = properties(&endpoint.reserved);
                if let Some(room) = response.get_mut(..properties.len()) {
                    room.copy_from_slice(&properties);
                }
                Status::Ok
            }
        };
        if let Some(room) = response.last_chunk_mut::<{ size_of::<ReqTail>() }>() {
            *room = [status.code(), 0, 0, 0];
        }
        Outcome { response, changes: Vec::new() }
    }

    /// Takes the endpoint out of its domain, which goes with its last endpoint, and
    /// into another, which is made if there is none.
    fn move_endpoint(&mut self, id: EndpointId, to: Option<(DomainId, bool)>) -> Vec<Change> {
        let mut changes = Vec::new();
        let bypassed = self.is_bypassed(id);
        let from = self.endpoints.get_mut(&id).and_then(|endpoint| endpoint.domain.take());
        if let Some(from) = from
            && let Some(members) = self.domains.get_mut(&from)
        {
            changes.extend(members.space.mappings().filter_map(|mapping| unmapped(id, mapping)));
            members.endpoints.remove(&id);
            if members.endpoints.is_empty() {
                self.domains.remove(&from);
            }
        }
        if let Some((domain, bypass)) = to {
            let new = || Members { space: Domain::new(bypass), endpoints: BTreeSet::new() };
            self.domains.entry(domain).or_insert_with(new).endpoints.insert(id);
            if let Some(endpoint) = self.endpoints.get_mut(&id) {
                endpoint.domain = Some(domain);
            }
        }
        match (bypassed, self.is_bypassed(id)) {
            (true, false) => changes.push(Change::BypassOff { endpoint: id }),
            (false, true) => changes.push(Change::BypassOn { endpoint: id }),
            _ => {}
        }
        if let Some(members) = to.and_then(|(domain, _)| self.domains.get(&domain)) {
            changes.extend(members.space.mappings().filter_map(|mapping| mapped(id, mapping)));
        }
        changes
    }

    fn space(&self, id: EndpointId) -> Option<&Domain> {
        let domain = self.endpoints.get(&id)?.domain?;
        self.domains.get(&domain).map(|members| &members.space)
    }

    /// Whether the endpoint reaches all memory untranslated (5.13.6).
    pub fn is_bypassed(&self, id: EndpointId) -> bool {
        match self.endpoints.get(&id) {
            Some(Endpoint { domain: None, .. }) => self.bypass,
            _ => self.space(id).is_some_and(Domain::is_bypass),
        }
    }

    /// The endpoint's domain, if it is in one.
    pub fn domain_of(&self, id: EndpointId) -> Option<DomainId> {
        self.endpoints.get(&id)?.domain
    }

    /// Where an access of `len` bytes from `iova` on leads: guest-physical ranges in
    /// the order of the access, one for each mapping that it goes through. Each of
    /// them allows it, or there is a fault and nothing is reached.
    pub fn translate(
        &self,
        id: EndpointId,
        iova: Iova,
        len: u64,
        wanted: Access,
    ) -> Result<Vec<Reached>, Untranslated> {
        let span = Span::new(iova, len)?;
        let fault = |reason, address| Fault { endpoint: id, reason, wanted, address };
        if self.is_bypassed(id) {
            // 5.13.6.8.1: reserved addresses lead nowhere, in bypass mode too.
            let range = iova.raw()..=span.last().raw();
            let reserved = self.endpoints.get(&id).into_iter().flat_map(|endpoint| &endpoint.reserved);
            let hit = reserved.filter(|one| one.overlaps(&range)).map(|one| *one.range.start()).min();
            return match hit {
                Some(start) => Err(fault(FaultReason::Mapping, Iova::new(start.max(iova.raw()))).into()),
                None => Ok(vec![span.identity()]),
            };
        }
        let space = self.space(id).ok_or_else(|| fault(FaultReason::Domain, iova))?;
        Ok(space.translate(span, wanted).map_err(|address| fault(FaultReason::Mapping, address))?)
    }

    /// The mapping that the endpoint has at an address, whatever it allows.
    pub fn mapping_at(&self, id: EndpointId, iova: Iova) -> Option<&Mapping> {
        self.space(id)?.mapping_at(iova)
    }

    /// All mappings of the endpoint's domain, by rising address.
    pub fn mappings(&self, id: EndpointId) -> impl Iterator<Item = &Mapping> {
        self.space(id).into_iter().flat_map(Domain::mappings)
    }
}

/// A request of which enough bytes are there.
fn parse<T: FromBytes + KnownLayout + Immutable>(readable: &[u8]) -> Option<T> {
    T::read_from_prefix(readable).ok().map(|(request, _)| request)
}

fn tail(status: Status) -> Vec<u8> {
    ReqTail { status: status.code(), reserved: [0; 3] }.as_bytes().to_vec()
}

fn mapped(endpoint: EndpointId, mapping: &Mapping) -> Option<Change> {
    let &Mapping { iova, gpa, .. } = mapping;
    mapping.access().map(|access| Change::Mapped { endpoint, iova, gpa, access })
}

fn unmapped(endpoint: EndpointId, mapping: &Mapping) -> Option<Change> {
    mapping.access().map(|_| Change::Unmapped { endpoint, iova: mapping.iova })
}
