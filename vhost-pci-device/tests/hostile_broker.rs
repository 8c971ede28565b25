//! What a broker that means harm can do to a vCPU, or to a device that is being unplugged: nothing.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept, bind, connect, listen, socket_with,
};
use support::broker::{Broker, Features};
use support::eventually;
use support::vmm::FakeVmm;
use vhost_pci_device::{Device, Options};

/// What is to be done in this time, or the test fails.
const WATCHDOG: Duration = Duration::from_secs(5);

fn in_time<T: Send + 'static>(what: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, is_done) = mpsc::channel();
    thread::spawn(move || done.send(work()));
    is_done.recv_timeout(WATCHDOG).unwrap_or_else(|_| panic!("{what}: never"))
}

#[test]
fn a_device_goes_at_once_though_nobody_accepts_its_connection() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("peer.sock");
    let address = SocketAddrUnix::new(&path).unwrap();
    let socket = || {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap()
    };
    let listener = socket();
    bind(&listener, &address).unwrap();
    listen(&listener, 0).unwrap();

    let broker = Broker::new(Features::default());
    let device = thread::scope(|scope| {
        scope.spawn(|| {
            eventually("the device's connection", || match accept(&listener) {
                Ok(stream) => {
                    broker.accept(UnixStream::from(stream)).unwrap();
                    true
                }
                Err(_) => false,
            });
        });
        Device::connect(&path, FakeVmm::new(), Options::default()).unwrap()
    });
    let mut waiting = Vec::new();
    loop {
        let other = socket();
        match connect(&other, &address) {
            Ok(()) => waiting.push(other),
            Err(error) => break assert_eq!(error, rustix::io::Errno::AGAIN),
        }
    }
    broker.die(true);
    // Until it tries to connect again.
    eventually("the loss", || !device.snapshot().connected);
    thread::sleep(Duration::from_millis(200));
    in_time("the drop", move || drop(device));
}
