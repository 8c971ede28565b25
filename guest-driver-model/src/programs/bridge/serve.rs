//! Moves the packets of a bridge, and waits for them.
//!
//! Owns: the sessions with the devices. Nothing is held from one burst to the next: an owner
//! that has no room for a packet does not get it, so that no port waits for another. Nor does any for an owner's
//! VMM, but for a moment.

use std::time::{Duration, Instant};

use super::BridgeArgs;
use super::burst::{Burst, Port, Rest};
use super::counters::PortReport;
use super::frame;
use super::switch::{Event, Switch, Verdict};
use super::table::{HOLD, PortId};
use crate::net::transmit_vring;
use crate::programs::ProgramError;
use crate::programs::allowance::Allowance;
use crate::programs::live::Live;
use crate::programs::quiet::Quiet;
use crate::programs::run::{LONGEST_SLEEP, ROUNDS};
use crate::programs::session::Session;
use crate::programs::stop::Stop;
use crate::programs::tally::Tally;
use crate::programs::traffic::{Reporter, Traffic};
use crate::programs::unrest::Unrest;
use crate::programs::waiting::{Idle, Sleeps, sleep};
use crate::transport::Transport;

/// Looks for a device that is gone.
pub(super) type Reopen<'a, 'd> = dyn Fn(usize) -> Option<Box<dyn Transport + 'd>> + 'a;

/// Why the sessions ended.
pub(super) enum Ended<'d> {
    /// The program is to end.
    Asked,
    /// The device of a port is gone.
    Gone(usize, ProgramError),
    /// It is back.
    Back(usize, Box<dyn Transport + 'd>),
}

/// What outlives the devices.
pub(super) struct Bridge<'a> {
    args: &'a BridgeArgs,
    stop: &'a Stop,
    reporter: Reporter,
    names: Vec<String>,
    switch: Switch,
    /// For lines that owners can cause.
    quiet: Quiet,
    ended: Tally,
    /// By port, while another port's device goes or comes.
    paused: Vec<Option<Rest>>,
    sleeps: Sleeps,
    copied_bytes: u64,
    /// What the sessions that there are came to when this was last asked.
    tally: Tally,
    burst: Burst,
}

impl<'a> Bridge<'a> {
    /// Of ports with these names.
    pub fn new(args: &'a BridgeArgs, stop: &'a Stop, names: Vec<String>) -> Self {
        let ports = names.len();
        Self {
            args,
            stop,
            reporter: Reporter::new(&args.run.report, "bridge"),
            switch: Switch::new(args.limits(), args.flood_limit, ports),
            names,
            quiet: Quiet::default(),
            ended: Tally::default(),
            paused: std::iter::repeat_with(|| None).take(ports).collect(),
            sleeps: Sleeps::default(),
            copied_bytes: 0,
            tally: Tally::default(),
            burst: Burst::new(ports),
        }
    }

    /// The device of a port calls itself so.
    pub fn is_called(&mut self, port: usize, name: &str) {
        self.names.iter_mut().skip(port).take(1).for_each(|at| name.clone_into(at));
    }

    /// Drives the devices that are there until the program is to end, or what is there changes.
    pub fn drive<'d>(
        &mut self,
        transports: &[Option<&(dyn Transport + 'd)>],
        reopen: Option<&Reopen<'_, 'd>>,
    ) -> Ended<'d> {
        let interrupt = self.args.run.wait.wait.needs_interrupts();
        let mut ports = Vec::with_capacity(transports.len());
        for ((at, transport), paused) in transports.iter().enumerate().zip(&mut self.paused) {
            ports.push(match (transport, paused.take()) {
                (None, _) => None,
                (Some(transport), Some(rest)) => Some(Port::resume(*transport, interrupt, rest)),
                (Some(transport), None) => match Session::new(*transport, interrupt) {
                    Ok(session) => Some(Port::new(session.allowing(Allowance::of_many()))),
                    Err(error) => return self.pause(ports, Ended::Gone(at, error)),
                },
            });
        }
        let ended = self.serve(&mut ports, reopen);
        self.pause(ports, ended)
    }

    /// The sessions end, or go on as soon as the device that is gone is let go, or the one that is back there.
    fn pause<'d>(&mut self, ports: Vec<Option<Port<'_>>>, ended: Ended<'d>) -> Ended<'d> {
        let is_asked = matches!(ended, Ended::Asked);
        for ((at, port), paused) in ports.into_iter().enumerate().zip(&mut self.paused) {
            let Some(port) = port else { continue };
            if is_asked || matches!(ended, Ended::Gone(gone, _) if gone == at) {
                self.ended += port.session.tally();
                port.session.end(is_asked);
            } else {
                *paused = Some(port.pause());
            }
        }
        // It would keep the window of who sent last: the kernel waits for a device of which that is mapped.
        self.burst.release();
        if is_asked {
            self.tally = self.ended;
        }
        ended
    }

    fn serve<'d>(&mut self, ports: &mut [Option<Port<'_>>], reopen: Option<&Reopen<'_, 'd>>) -> Ended<'d> {
        // Of several that went at once the others are let go of now.
        if let Some(ended) = self.gone(ports) {
            return ended;
        }
        let mut idle = Idle::new(self.args.run.wait);
        let mut unrest = Unrest::new(self.args.run.unrest);
        let mut rounds = 0_u32;
        let mut checked = Instant::now();
        loop {
            let moved = self.round(ports);
            rounds += 1;
            if moved > 0 {
                idle.reset();
            } else if !ports.iter().flatten().any(|port| port.session.is_live()) || idle.rest() {
                self.sleep(ports);
                rounds = ROUNDS;
            }
            unrest.after_round();
            let enough = self.args.packets.is_some_and(|limit| self.switch.received() >= limit);
            if rounds < ROUNDS && !enough {
                continue;
            }
            rounds = 0;
            ports.iter().flatten().for_each(|port| port.session.follow_doorbell());
            self.tell();
            self.count(ports);
            let traffic = self.traffic();
            let (names, switch) = (&self.names, &self.switch);
            let running = self.reporter.tick_ports(&traffic, || reports(names, switch));
            if enough || self.args.run.is_over(running) || self.stop.is_requested() {
                return Ended::Asked;
            }
            if checked.elapsed() >= LONGEST_SLEEP || ports.iter().flatten().any(|port| port.session.is_over())
            {
                checked = Instant::now();
                self.switch.sweep(checked);
                for (at, port) in ports.iter_mut().enumerate() {
                    match (port, reopen) {
                        (Some(port), _) => {
                            if let Err(error) = port.session.check() {
                                port.gone = Some(error);
                            }
                        }
                        (None, Some(reopen)) => {
                            if let Some(back) = reopen(at) {
                                return Ended::Back(at, back);
                            }
                        }
                        (None, None) => {}
                    }
                }
            }
            if let Some(ended) = self.gone(ports) {
                return ended;
            }
        }
    }

    /// The first port whose device is gone.
    fn gone<'d>(&mut self, ports: &mut [Option<Port<'_>>]) -> Option<Ended<'d>> {
        let mut all = ports.iter_mut().enumerate();
        let (at, error) = all.find_map(|(at, port)| Some((at, port.as_mut()?.gone.take()?)))?;
        self.switch.set_live(at as PortId, false);
        Some(Ended::Gone(at, error))
    }

    /// One burst of each port and pair. Returns how many packets moved.
    fn round(&mut self, ports: &mut [Option<Port<'_>>]) -> usize {
        // Before anything moves: where a link was lost, and may be up again, its stations are forgotten.
        for (at, port) in ports.iter_mut().enumerate() {
            let Some(port) = port else { continue };
            let (was_lost, is_live) = port.begin_round();
            if was_lost {
                self.switch.set_live(at as PortId, false);
            }
            self.switch.set_live(at as PortId, is_live);
        }
        let mut moved = 0;
        for from in 0..ports.len() {
            let pairs = ports.get(from).and_then(Option::as_ref).map_or(0, |port| port.session.pairs());
            for pair in 0..pairs {
                moved += self.burst(ports, from, pair);
            }
        }
        moved
    }

    /// One burst of a pair.
    fn burst(&mut self, ports: &mut [Option<Port<'_>>], from: usize, pair: u16) -> usize {
        let Self { switch, burst, copied_bytes, .. } = self;
        let Some(port) = ports.get_mut(from).and_then(Option::as_mut) else { return 0 };
        let Some(mut wire) = port.wire() else { return 0 };
        let lent = wire.lend(pair, &mut burst.lent);
        // What the owner's IOMMU lets nobody read in place is received.
        let mut is_private =
            lent == 0 && burst.lent.needs_copy() && wire.receive(pair, &mut burst.private) > 0;
        let is_seen =
            burst.look(is_private, wire.has_headers(pair)) && (is_private || wire.is_in_place(&burst.lent));
        let is_faulted = wire.is_faulted();
        drop(wire);
        if is_faulted {
            port.session.report_faults();
        }
        if !is_seen {
            return 0;
        }
        if is_private {
            *copied_bytes += burst.seen.iter().map(|seen| seen.len as u64).sum::<u64>();
        }
        switch.begin(Instant::now());
        let from_id = from as PortId;
        for seen in &burst.seen {
            match switch.decide(from_id, &seen.head, seen.len) {
                Verdict::To(to) => {
                    if let Some(picks) = burst.picks.get_mut(usize::from(to)) {
                        picks.push(seen.pick);
                    }
                }
                Verdict::Flood => {
                    let others = switch.others(from_id);
                    let is_other = |to: &usize| others >> to & 1 == 1;
                    let all = burst.picks.iter_mut().enumerate();
                    all.filter(|(to, _)| is_other(to)).for_each(|(_, picks)| picks.push(seen.pick));
                }
                Verdict::Drop => {}
            }
        }
        for to in 0..ports.len() {
            if burst.picks.get(to).is_none_or(Vec::is_empty) {
                continue;
            }
            let copied = match ports.get_disjoint_mut([from, to]) {
                Ok([Some(source), Some(target)]) => burst.copy((source, pair), (target, to), &mut is_private),
                _ => burst.none(to),
            };
            *copied_bytes += copied.private_bytes + copied.bytes;
            if let Some(counters) = switch.counters(to as PortId) {
                counters.tx_packets += copied.packets as u64;
                counters.tx_bytes += copied.bytes;
                counters.dropped.full += copied.full as u64;
                counters.dropped.refused += copied.refused as u64;
                counters.dropped.no_link += copied.gone as u64;
            }
        }
        if !is_private
            && let Some(mut wire) = ports.get_mut(from).and_then(Option::as_mut).and_then(Port::wire)
        {
            wire.give_back(pair, &mut burst.lent);
        }
        burst.seen.len()
    }

    /// Sleeps until an owner kicks, or a link changes. Room is never waited for.
    fn sleep(&mut self, ports: &mut [Option<Port<'_>>]) {
        let is_live = ports.iter().flatten().any(|port| port.session.is_live());
        let waited_for = |live: &Live| match is_live {
            true => (0..live.port.pairs()).map(transmit_vring).collect(),
            false => Vec::new(),
        };
        let armed: Vec<_> = ports.iter_mut().flatten().map(|port| port.session.arm(waited_for)).collect();
        let events: Vec<_> = armed.iter().flat_map(|armed| armed.events.iter().copied()).collect();
        let most = armed.iter().map(|armed| armed.most).min().unwrap_or(LONGEST_SLEEP);
        if events.is_empty() {
            std::thread::sleep(most.min(Duration::from_millis(100)));
        } else if !is_live {
            sleep(&events, &[], most);
        } else if !armed.iter().any(|armed| armed.has_work) {
            let missed = || {
                let mut both = ports.iter_mut().flatten().zip(&armed);
                both.any(|(port, armed)| port.session.has_missed(armed))
            };
            self.sleeps.sleep(&events, &[], most, missed);
        }
        for (port, armed) in ports.iter_mut().flatten().zip(&armed) {
            port.session.disarm(armed);
        }
    }

    /// Says what owners did that an operator has to know of.
    fn tell(&mut self) {
        let name = |port: PortId| self.names.get(usize::from(port)).map_or("", String::as_str);
        for event in self.switch.events() {
            if !self.quiet.allows_line() {
                continue;
            }
            match event {
                Event::Storm(port) => tracing::warn!(
                    port = name(port),
                    "more than {} frames a second are to go to all ports: the others of them are dropped. Is \
                     there a loop (two bridges cabled in a circle, an owner that sends everything back)? \
                     --flood-limit is what may pass",
                    self.args.flood_limit
                ),
                Event::Flaps { station, at, other } => tracing::warn!(
                    station = frame::text(&station),
                    port = name(at),
                    other = name(other),
                    "a station moves to and fro between two ports: there is a loop, or another one uses its \
                     address. It is held at the first for {HOLD:?}: what comes from it by others is not flooded"
                ),
                Event::Full(port) => tracing::warn!(
                    port = name(port),
                    "there are more than {} stations: the others of them are not learned, and what is for them \
                     goes to all ports (--stations)",
                    self.args.stations
                ),
            }
        }
    }

    fn count(&mut self, ports: &[Option<Port<'_>>]) {
        self.tally = ports.iter().flatten().fold(self.ended, |sum, port| sum + port.session.tally());
    }

    /// What was moved.
    fn traffic(&self) -> Traffic {
        let mut traffic = Traffic { copied_bytes: Some(self.copied_bytes), ..Traffic::default() };
        for port in 0..self.names.len() {
            let (counters, ..) = self.switch.port(port as PortId);
            traffic.rx_packets += counters.rx_packets;
            traffic.rx_bytes += counters.rx_bytes;
            traffic.tx_packets += counters.tx_packets;
            traffic.tx_bytes += counters.tx_bytes;
            traffic.dropped += counters.dropped.sum();
        }
        let traffic = traffic.with_demand(self.tally.demand).with_sleeps(self.sleeps);
        Traffic { faults: self.tally.faults, links: self.tally.links, ..traffic }
    }

    /// What was moved, and each port's part of that.
    pub fn report(&self) -> (Traffic, Vec<PortReport>) {
        (self.traffic(), reports(&self.names, &self.switch))
    }

    /// The program ends.
    pub fn end(&mut self) {
        self.tell();
        let (traffic, reports) = self.report();
        self.reporter.end_with_ports(&traffic, &reports);
    }
}

/// Each port's part.
fn reports(names: &[String], switch: &Switch) -> Vec<PortReport> {
    let report = |(port, name): (usize, &String)| {
        let (counters, up, stations) = switch.port(port as PortId);
        PortReport { port: name.clone(), up, stations, counters }
    };
    names.iter().enumerate().map(report).collect()
}
