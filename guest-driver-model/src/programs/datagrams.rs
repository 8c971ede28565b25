//! Test: `datagrams` exchanges datagrams that can be checked with another guest, through its own
//! kernel's network stack, and says how long none came.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;
use signal_hook::consts::SIGUSR1;

use super::pattern::Checker;
use super::sink::Check;
use super::source::{Source, SourceArgs};
use super::stop::Stop;
use super::{ProgramError, say};

/// Between two lines.
const LINE: Duration = Duration::from_millis(100);
/// Longest wait for a datagram.
const WAIT: Duration = Duration::from_millis(2);
/// Datagrams between two looks at what there is to send: more than are sent at once.
const AT_ONCE: usize = 64;
/// The longest datagram.
const MOST: usize = 2048;

/// What `datagrams` can be told.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct DatagramsArgs {
    /// Where they come
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub here: SocketAddr,
    /// Where they go
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub there: SocketAddr,
    /// What to send.
    #[command(flatten)]
    pub source: SourceArgs,
}

/// A JSON line: counts since the start.
#[derive(Debug, Default, Serialize)]
struct Line {
    sent: u64,
    received: u64,
    /// Missing among those received, with those still on their way.
    lost: u64,
    /// Later than a later one, or twice.
    reordered: u64,
    corrupted: u64,
    /// Times that another sender began.
    streams: u64,
    /// The longest time without one since SIGUSR1 came, up to now.
    gap_ms: u64,
}

/// Runs until SIGTERM.
///
/// # Errors
/// If the system gives no socket.
pub fn run(args: &DatagramsArgs) -> Result<(), ProgramError> {
    let failed = |what| move |source| ProgramError::System { what, source };
    let stop = Stop::on_signals().map_err(failed("signal handlers"))?;
    let begin = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(SIGUSR1, begin.clone()).map_err(failed("signal handlers"))?;
    let socket = UdpSocket::bind(args.here).map_err(failed("a socket for datagrams"))?;
    socket.set_read_timeout(Some(WAIT)).map_err(failed("a socket for datagrams"))?;
    let mut source = Source::new(&args.source, Check::Pattern);
    let mut checker = Checker::new();
    let (mut line, mut told) = (Line::default(), Instant::now());
    let (mut last, mut longest) = (Instant::now(), Duration::ZERO);
    let mut room = [0; MOST];
    while !stop.is_requested() {
        // What the kernel cannot send now, as while there is no link, is lost as on any network.
        line.sent += source.offer(|frames| {
            let offered = frames.len();
            frames.for_each(|frame| drop(socket.send_to(frame, args.there)));
            offered
        }) as u64;
        // Else nothing came, or what was sent came back as an ICMP message, or a signal came.
        for _ in 0..AT_ONCE {
            let Ok(len) = socket.recv(&mut room) else { break };
            line.received += 1;
            checker.check(room.get(..len).unwrap_or_default());
            longest = longest.max(last.elapsed());
            last = Instant::now();
        }
        // Relaxed: the flag publishes nothing but itself.
        if begin.swap(false, Ordering::Relaxed) {
            longest = Duration::ZERO;
        }
        if told.elapsed() >= LINE {
            told = Instant::now();
            let verdict = checker.verdict();
            (line.lost, line.reordered) = (verdict.lost, verdict.reordered);
            (line.corrupted, line.streams) = (verdict.corrupted, verdict.streams);
            line.gap_ms = longest.max(last.elapsed()).as_millis() as u64;
            if let Ok(text) = serde_json::to_string(&line) {
                say(&text);
            }
        }
    }
    Ok(())
}
