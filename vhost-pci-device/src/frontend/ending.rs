//! Ends that the broker can draw out. It sends descriptors, and closing one can take as long as
//! somebody likes: a file whose server is slow, a TCP connection that lingers. They are closed where
//! they arrive, by the kernel too, in any call on a socket in which they wait. So a thread
//! that has to do with the broker's sockets is waited for, but not for long.

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a connection's end may take before its thread goes on without it.
const CLOSE_TIME: Duration = Duration::from_millis(200);
/// How often it is looked at.
const LOOK_AGAIN: Duration = Duration::from_micros(100);

/// Waits for the end of a thread; at most so long. A panic of it was reported by the panic hook.
pub fn await_end(thread: &JoinHandle<()>, most: Duration) {
    let until = Instant::now() + most;
    while !thread.is_finished() && Instant::now() < until {
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// The same for what belongs to a connection.
pub fn await_close(thread: &JoinHandle<()>) {
    await_end(thread, CLOSE_TIME);
}

/// Drops it, and waits for that no longer than it should take.
pub fn close(value: impl Send + 'static) {
    // Without a thread it is dropped here.
    if let Ok(thread) = std::thread::Builder::new().name("vhost-pci close".into()).spawn(move || drop(value))
    {
        await_close(&thread);
    }
}
