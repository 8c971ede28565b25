//! What a broker that means harm can do to a vCPU, or to a device that is being unplugged: nothing.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod support;

use std::io::{IoSliceMut, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::fs::{OFlags, fcntl_setfl};
use rustix::io::{ReadWriteFlags, preadv2, write};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept, bind, connect, listen, socket_with,
};
use support::broker::{Broker, Features, SHMEM_MAP, longs, message, send};
use support::guest::{DATA, REGISTERS_AT};
use support::vmm::FakeVmm;
use support::{Bench, PAGE, VRINGS, eventually, file};
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

const QUEUE: u16 = 1;
const NOTIFICATIONS: usize = 200_000;

fn drain(event: &OwnedFd) {
    let mut count = [0; 8];
    // An error is an empty count.
    let _ = preadv2(event, &mut [IoSliceMut::new(&mut count)], u64::MAX, ReadWriteFlags::NOWAIT);
}

/// Makes an eventfd blocking, and fills it again and again. Empties it only after progress: whoever
/// is caught in a write stays there.
struct Attack {
    stop: Arc<AtomicBool>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Attack {
    fn on(event: OwnedFd, progress: Arc<AtomicUsize>) -> Self {
        fcntl_setfl(&event, OFlags::empty()).unwrap();
        let (stop, event) = (Arc::new(AtomicBool::new(false)), Arc::new(event));
        let filler = {
            let (stop, event) = (stop.clone(), event.clone());
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    write(&*event, &(u64::MAX - 1).to_ne_bytes()).unwrap();
                }
            })
        };
        let stopped = stop.clone();
        let emptier = thread::spawn(move || {
            // The last write of the other waits for this one.
            let mut seen = 0;
            while !stopped.load(Ordering::Relaxed) || !filler.is_finished() {
                let now = progress.load(Ordering::Relaxed);
                if now != seen || stopped.load(Ordering::Relaxed) {
                    seen = now;
                    drain(&event);
                }
            }
        });
        Self { stop, threads: vec![emptier] }
    }
}

impl Drop for Attack {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
    }
}

#[test]
fn a_vcpu_notifies_though_the_broker_fills_the_eventfd_and_lets_it_block() {
    let bench = Bench::new();
    bench.vmm.refuse(false, true);
    bench.start();
    let progress = Arc::new(AtomicUsize::new(0));
    let attack = Attack::on(bench.broker.kick_descriptor(QUEUE.into()), progress.clone());
    let offset = bench.guest.notify_address(QUEUE) - REGISTERS_AT;
    let device = bench.guest.device.clone();
    in_time("the notifications", move || {
        for _ in 0..NOTIFICATIONS {
            device.bar_write(0, offset, &QUEUE.to_le_bytes());
            progress.fetch_add(1, Ordering::Relaxed);
        }
    });
    in_time("the drop under attack", move || drop(bench));
    drop(attack);
}

#[test]
fn an_eventfd_that_is_left_full_and_blocking_keeps_no_signal_of_the_loss() {
    let bench = Bench::new();
    bench.vmm.refuse(false, true);
    bench.start();
    let kick = bench.broker.kick_descriptor(QUEUE.into());
    let progress = Arc::new(AtomicUsize::new(0));
    let attack = Attack::on(kick.try_clone().unwrap(), progress.clone());
    for _ in 0..1000 {
        bench.guest.notify(QUEUE);
        progress.fetch_add(1, Ordering::Relaxed);
    }
    drop(attack);
    drain(&kick);
    write(&kick, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    bench.guest.notify(QUEUE);
    bench.vmm.interrupts(DATA + u32::from(QUEUE));
    bench.broker.die(true);
    eventually("the driver is woken", || bench.vmm.interrupts(DATA + u32::from(QUEUE)) > 0);
}

/// A connection whose last close takes a minute, as its other end, which comes second, reads nothing.
fn lingering() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut slow = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (other, _) = listener.accept().unwrap();
    rustix::net::sockopt::set_socket_linger(&slow, Some(Duration::from_secs(60))).unwrap();
    slow.set_nonblocking(true).unwrap();
    while slow.write(&[0; 65536]).is_ok() {}
    (slow, other)
}

#[test]
fn a_descriptor_whose_close_takes_its_time_keeps_neither_the_next_connection_nor_the_drop() {
    let bench = Bench::started();
    let (slow, other) = lingering();
    let channel = bench.broker.channel();
    let bytes = message(SHMEM_MAP, 9, &longs(&[0, 0, 2 << 20, PAGE, 1]));
    // The device has it with the header, so that the last to close it is the device.
    send(&channel, &bytes[..12], &[slow.as_fd()]).unwrap();
    drop(slow);
    send(&channel, &bytes[12..], &[]).unwrap();
    thread::sleep(Duration::from_millis(100));
    bench.broker.die(false);
    eventually("another connection", || bench.broker.connections() == 2);
    bench.broker.wait_until_started(VRINGS + 1);
    let memory = file(PAGE);
    eventually("a mapping by it", || bench.broker.map(2 << 20, PAGE, &memory, 0, true));
    drop(channel);
    let vmm = bench.vmm.clone();
    in_time("the drop", move || drop(bench));
    assert_eq!(vmm.registered(), (0, 0));
    assert!(vmm.slots().is_empty() && vmm.traps().is_empty());
    // Otherwise its close would keep this process.
    drop(other);
}

#[test]
fn a_descriptor_that_nobody_takes_from_the_socket_keeps_neither_the_next_connection_nor_the_drop() {
    let bench = Bench::started();
    let (slow, other) = lingering();
    // Unasked; closed by the kernel with the socket in which it waits.
    send(&bench.broker.main(), &message(1, 5, &longs(&[0])), &[slow.as_fd()]).unwrap();
    drop(slow);
    eventually("another connection", || bench.broker.connections() == 2);
    bench.broker.wait_until_started(VRINGS + 1);
    in_time("the drop", move || drop(bench));
    drop(other);
}
