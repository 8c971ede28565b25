//! A link with its real driver, without listening sockets: what is connected to it is one end of
//! a socket pair, of which the fuzzer has the other.

use std::os::unix::net::UnixStream;
use std::sync::Once;
use std::time::Duration;

use crossbeam_channel::bounded;
use vhost_pci_switch::config::{Admission, DEFAULT_MEMORY_REGIONS, LinkConfig, OneWay, Rates, WiringPolicy};
use vhost_pci_switch::kind;
use vhost_pci_switch::link::report::LinkReport;
use vhost_pci_switch::link::{Link, Side};
use vhost_pci_switch::runtime::driver::LinkDriver;
use vhost_pci_switch::runtime::relay::Relay;
use vhost_pci_switch::runtime::{Input, LinkPort, Pass};

use crate::census::Census;
use crate::front::Pool;
use crate::sys;

/// How long a peer's VMM has to confirm a change: short, as the fuzzer's often does not.
pub const TIMEOUT: Duration = Duration::from_millis(40);
/// Length of the window, bytes.
pub const WINDOW: u64 = 64 << 20;

/// A link as a configuration has it.
pub fn config() -> LinkConfig {
    LinkConfig {
        name: "fuzz".into(),
        owner_socket: "/nowhere/owner".into(),
        peer_socket: "/nowhere/peer".into(),
        window_len: WINDOW,
        device: kind::net::device(1, false),
        one_way: OneWay::Refuse,
        max_mappings: 16,
        wiring: WiringPolicy::Direct,
        doorbell_socket: None,
        memory_regions: DEFAULT_MEMORY_REGIONS,
        unsealed_memory: false,
        migration: true,
        rates: Rates::default(),
        owner_admission: Admission::default(),
        peer_admission: Admission::default(),
    }
}

/// A running link, and how many descriptors and threads there were before it. Ends when dropped.
#[derive(Debug)]
pub struct Running {
    port: LinkPort,
    before: Option<Census>,
}

impl Running {
    /// Starts it.
    pub fn start(config: LinkConfig) -> Self {
        static FIRST: Once = Once::new();
        FIRST.call_once(|| {
            sys::ignore_sigpipe();
            // Lines are made, as they would be, and thrown away.
            tracing_subscriber::fmt().with_writer(std::io::sink).init();
            // What the process makes once.
            let _ = Pool::of_process();
            drop(Relay::new("fuzz", LinkPort::default(), 1).expect("descriptors"));
        });
        Self::begin(config)
    }

    fn begin(config: LinkConfig) -> Self {
        let before = Census::take();
        let port = LinkPort::default();
        let link_id = u64::from(config.doorbell_socket.is_some());
        let link = Link::new(config.clone(), TIMEOUT, 1000).expect("a configuration that can be run");
        port.start(LinkDriver::new(&config, link, link_id, port.clone()).expect("memory"));
        Self { port, before: Some(before) }
    }

    /// The same, for many inputs: what there is when it ends is not compared with what there was when it began, as
    /// the fuzzer itself opens something now and then.
    pub fn for_many(self) -> Self {
        let mut running = self;
        running.before = None;
        running
    }

    /// The way to it.
    pub fn port(&self) -> &LinkPort {
        &self.port
    }

    /// A connection to it.
    pub fn connect(&self, side: Side) -> UnixStream {
        let (mine, theirs) = UnixStream::pair().expect("descriptors");
        self.port.send(Input::Connected { side, stream: theirs, pass: Pass::default() });
        mine
    }

    /// What `status` would tell.
    pub fn report(&self) -> LinkReport {
        let (sender, report) = bounded(1);
        self.port.send(Input::Report(sender));
        report.recv().expect("the link has not ended")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.port.end();
        if let Some(before) = self.before {
            before.is_as_before();
        }
    }
}
