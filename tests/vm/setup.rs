//! What a testbed is like: how the peer's driver waits, what stands between the owner's card and its
//! memory, and which QEMU that makes.

use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::json;
use vhost_pci_tests::{Guest, GuestConfig, Sandbox};

use crate::{beside, vf_far_side};

/// The doorbell socket's name, beside the others.
pub const DOORBELL_SOCKET: &str = "doorbell.sock";

/// How long a guest may take to let go of a device.
const UNPLUG: Duration = Duration::from_secs(60);

/// The peer's device, and where it is plugged, if it can be unplugged.
const PEER_DEVICE: &str = "vhost-pci";
const PEER_PORT: &str = "vhost-pci-port";

/// How the peer's driver learns of packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// It polls, through sysfs.
    Poll,
    /// It waits for MSI-X interrupts, through VFIO behind a virtual IOMMU.
    Interrupt,
}

impl Mode {
    pub const ALL: [Self; 2] = [Self::Poll, Self::Interrupt];

    /// Pairs of queues of the link; an owner with one CPU sets up all and enables the first.
    const fn pairs(self) -> u16 {
        match self {
            Self::Poll => 1,
            Self::Interrupt => 2,
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            Self::Poll => "poll",
            Self::Interrupt => "interrupt",
        }
    }
}

/// What stands between the owner's card and the owner's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Iommu {
    /// Nothing: the card reaches all of it.
    None,
    /// virtio-iommu. The kernel maps each packet, and unmaps it at once (strict mode).
    Virtio,
    /// intel-iommu, the same way.
    Intel,
}

impl Iommu {
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "no IOMMU",
            Self::Virtio => "virtio-iommu",
            Self::Intel => "intel-iommu",
        }
    }
}

/// What works the owner's card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnerDriver {
    /// The kernel.
    Kernel,
    /// A program, through VFIO.
    Vfio,
}

/// What a testbed is like.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub mode: Mode,
    pub iommu: Iommu,
    pub driver: OwnerDriver,
    /// More of the link's section in the broker's configuration.
    pub config: &'static str,
    /// The owner's memory, MiB.
    pub owner_mib: u32,
    /// MSI-X vectors of the peer's doorbell function, if it has one.
    pub doorbell: Option<u16>,
    /// Whether the owner's card has packed rings.
    pub packed: bool,
    /// Whether the owner's QEMU waits for a broker that is gone to come back, and the peer's device can
    /// be unplugged and plugged anew. (QEMU 11.1.3 as the peer's VMM does not survive `reconnect-ms`.)
    pub reconnect: bool,
    /// Whether the broker has a second link, for who carries on beside the first.
    pub beside: bool,
    /// Whether the peer has a network card with a virtual function, whose far side is the test; the
    /// broker then waits long for a peer.
    pub vf: bool,
}

impl From<Mode> for Setup {
    /// An owner without an IOMMU.
    fn from(mode: Mode) -> Self {
        Self {
            mode,
            iommu: Iommu::None,
            driver: OwnerDriver::Kernel,
            config: "",
            owner_mib: 512,
            doorbell: None,
            packed: false,
            reconnect: false,
            beside: false,
            vf: false,
        }
    }
}

impl Setup {
    /// A polling peer, and an owner whose card a program works behind intel-iommu.
    pub const fn vfio(config: &'static str) -> Self {
        let driver = OwnerDriver::Vfio;
        Self {
            mode: Mode::Poll,
            iommu: Iommu::Intel,
            driver,
            config,
            owner_mib: 512,
            doorbell: None,
            packed: false,
            reconnect: false,
            beside: false,
            vf: false,
        }
    }

    /// The broker's configuration.
    pub fn broker_config(&self, sandbox: &Sandbox) -> String {
        let socket = |name: &str| sandbox.dir().join(name).display().to_string();
        format!(
            "control_socket = {:?}\n{}[[link]]\nname = \"vm\"\nowner_socket = {:?}\npeer_socket = {:?}\n\
             queue_pairs = {}\n{}\n{}\n{}\n",
            socket("control.sock"),
            if self.vf { "confirm_timeout_ms = 40000\n" } else { "" },
            socket("owner.sock"),
            socket("peer.sock"),
            self.mode.pairs(),
            self.doorbell
                .map_or(String::new(), |_| format!("doorbell_socket = {:?}", socket(DOORBELL_SOCKET))),
            self.config,
            if self.beside {
                let (owner, peer) = (socket(beside::OWNER_SOCKET), socket(beside::PEER_SOCKET));
                format!("[[link]]\nname = \"beside\"\nowner_socket = {owner:?}\npeer_socket = {peer:?}\n")
            } else {
                String::new()
            },
        )
    }

    /// Starts the owner's VM.
    pub fn spawn_owner(&self, sandbox: &Sandbox) -> Result<Guest> {
        self.owner(sandbox)?.spawn()
    }

    /// Starts another QEMU of the owner's VM, which waits for its state.
    pub fn spawn_destination(&self, sandbox: &Sandbox, number: u32, uri: &str) -> Result<Guest> {
        self.owner(sandbox)?.incoming(number, uri).spawn()
    }

    fn owner<'s>(&self, sandbox: &'s Sandbox) -> Result<GuestConfig<'s>> {
        let reconnect = if self.reconnect { ",reconnect-ms=100" } else { "" };
        let chardev = format!("socket,id=vp,path={}{reconnect}", sandbox.dir().join("owner.sock").display());
        let netdev = format!("vhost-user,id=net,chardev=vp,queues={}", self.mode.pairs());
        let mut card = "virtio-net-pci,netdev=net,disable-legacy=on".to_owned();
        if let pairs @ 2.. = self.mode.pairs() {
            // Two vectors a pair, and two more.
            card += &format!(",mq=on,vectors={}", 2 * pairs + 2);
        }
        if self.packed {
            card += ",packed=on";
        }
        if self.iommu != Iommu::None {
            card += ",iommu_platform=on,ats=on";
        }
        let guest = with_iommu(sandbox.guest("owner"), self.iommu)
            .memory_mib(self.owner_mib)
            .args(["-chardev", &chardev, "-netdev", &netdev, "-device", &card])
            .file("/bin/vhost-pci-guest", sandbox.guest_program("vhost-pci-guest")?);
        Ok(match self.driver {
            OwnerDriver::Kernel => guest.modules(["virtio_net"]),
            OwnerDriver::Vfio => guest.modules(["vfio-pci"]),
        })
    }

    /// Starts the peer's VM.
    pub fn spawn_peer(&self, sandbox: &Sandbox) -> Result<Guest> {
        let chardev = format!("socket,id=vp,path={}", sandbox.dir().join("peer.sock").display());
        let queues = 1 + 2 * self.mode.pairs();
        let mut device =
            format!("vhost-user-test-device-pci,chardev=vp,virtio-id=38,num_vqs={queues},config_size=64");
        if self.reconnect {
            device += &format!(",id={PEER_DEVICE},bus={PEER_PORT}");
        }
        let guest = sandbox
            .guest("peer")
            .args(["-chardev", &chardev])
            .file("/bin/vhost-pci-guest", sandbox.guest_program("vhost-pci-guest")?);
        match self.mode {
            Mode::Poll => self.with_port(guest).args(["-device", &device]).modules(["tun"]).spawn(),
            Mode::Interrupt => self
                .with_doorbell(
                    sandbox,
                    self.with_vf(sandbox, self.with_port(with_iommu(guest, Iommu::Intel))),
                )
                .args(["-device", &format!("{device},iommu_platform=on,ats=on")])
                .modules(["tun", "vfio-pci"])
                .spawn(),
        }
    }

    /// The guest with a network card that has a virtual function, if it shall have one.
    fn with_vf<'s>(&self, sandbox: &Sandbox, guest: GuestConfig<'s>) -> GuestConfig<'s> {
        if !self.vf {
            return guest;
        }
        let [here, far] =
            [vf_far_side::CARD_SOCKET, vf_far_side::SOCKET].map(|name| sandbox.dir().join(name));
        let card = "virtio-net-pci,bus=nic-port,disable-legacy=on,iommu_platform=on";
        guest
            .args(["-device", "pcie-root-port,id=nic-port,chassis=3,slot=3"])
            .args(["-netdev", "hubport,id=nic-pf,hubid=0", "-netdev"])
            .args([format!(
                "dgram,id=nic-vf,local.type=unix,local.path={},remote.type=unix,remote.path={}",
                here.display(),
                far.display()
            )])
            // QEMU wants the virtual function first.
            .args(["-device", &format!("{card},addr=0x0.1,netdev=nic-vf,sriov-pf=nic")])
            .args(["-device", &format!("{card},id=nic,addr=0x0.0,multifunction=on,netdev=nic-pf")])
            .modules(["virtio_net"])
    }

    /// The guest with a port for the peer's device, if that can be unplugged.
    fn with_port<'s>(&self, guest: GuestConfig<'s>) -> GuestConfig<'s> {
        match self.reconnect {
            // Without KVM, QEMU's CPU has 40 address bits, and the BIOS puts large BARs where its map of
            // memory says reserved: Linux gives none there to what is plugged later, unless told so.
            true => guest
                .args(["-device", &format!("pcie-root-port,id={PEER_PORT},chassis=2,slot=2")])
                .kernel_arg("pci=no_e820"),
            false => guest,
        }
    }

    /// Unplugs the peer's device, whose connection to the broker has ended, and plugs one with a new
    /// connection. The guest's driver lets the one go and takes the other.
    pub fn replug_peer(&self, sandbox: &Sandbox, guest: &mut Guest) -> Result<()> {
        guest.qmp("device_del", &json!({"id": PEER_DEVICE}))?;
        // QEMU refuses to remove the connection until the guest has let the device go.
        let deadline = Instant::now() + UNPLUG;
        while let Err(error) = guest.qmp("chardev-remove", &json!({"id": "vp"})) {
            if Instant::now() >= deadline {
                return Err(error.context("the guest does not let the device go"));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let address = json!({"type": "unix", "data": {"path": sandbox.dir().join("peer.sock")}});
        let backend = json!({"type": "socket", "data": {"server": false, "addr": address}});
        guest.qmp("chardev-add", &json!({"id": "vp", "backend": backend}))?;
        let device = json!({
            "driver": "vhost-user-test-device-pci", "id": PEER_DEVICE, "bus": PEER_PORT, "chardev": "vp", "virtio-id": 38,
            "num_vqs": 1 + 2 * self.mode.pairs(), "config_size": 64, "iommu_platform": true, "ats": true
        });
        guest.qmp("device_add", &device).map(drop)
    }

    /// The guest with a doorbell function, if it shall have one: in a port of its own, so that
    /// it can be unplugged.
    fn with_doorbell<'s>(&self, sandbox: &Sandbox, guest: GuestConfig<'s>) -> GuestConfig<'s> {
        let Some(vectors) = self.doorbell else { return guest };
        let socket = sandbox.dir().join(DOORBELL_SOCKET);
        guest.args([
            "-device",
            "pcie-root-port,id=bell-port,chassis=1,slot=1",
            "-chardev",
            &format!("socket,id=vpd,path={}", socket.display()),
            "-device",
            &format!("ivshmem-doorbell,id=bell,bus=bell-port,vectors={vectors},chardev=vpd"),
        ])
    }
}

/// The guest with an IOMMU. It has to come before the devices behind it.
fn with_iommu(guest: GuestConfig<'_>, iommu: Iommu) -> GuestConfig<'_> {
    match iommu {
        Iommu::None => guest,
        Iommu::Virtio => {
            guest.args(["-device", "virtio-iommu-pci"]).kernel_arg("iommu.strict=1").modules(["virtio-iommu"])
        }
        Iommu::Intel => guest
            .args(["-device", "intel-iommu,intremap=on,device-iotlb=on,caching-mode=on"])
            .kernel_arg("intel_iommu=on")
            .kernel_arg("iommu.strict=1"),
    }
}
