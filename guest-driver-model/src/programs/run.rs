//! What every program that moves packets has in common besides the packets: what it can be told of its
//! run, how often it looks up from the packets, and how it waits for a broker that is gone.

use std::time::Duration;

use super::ProgramError;
use super::quantity::seconds;
use super::stop::Stop;
use super::traffic::ReportArgs;
use super::unrest::UnrestArgs;
use super::waiting::WaitArgs;

/// Rounds between two looks at the clock.
pub(super) const ROUNDS: u32 = 64;
/// The longest sleep. Nothing but the look at the clock depends on it: who sleeps is woken
/// for each packet.
pub(super) const LONGEST_SLEEP: Duration = Duration::from_secs(1);
/// The same when all that is left to an owner is to see the last packets home.
pub(super) const LAST_SLEEP: Duration = Duration::from_millis(10);
/// How long an owner's packets that are on their way may take at the end.
pub(super) const LAST_PACKETS: Duration = Duration::from_secs(2);
/// Between two tries to have a broker, or a device, back.
const RECONNECT_PAUSE: Duration = Duration::from_millis(200);

/// What each of them can be told.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct RunArgs {
    /// How to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
    /// Whether to pause.
    #[command(flatten)]
    pub unrest: UnrestArgs,
    /// How to report.
    #[command(flatten)]
    pub report: ReportArgs,
    /// End this many seconds after the first packet
    #[arg(long, value_parser = seconds)]
    pub seconds: Option<f64>,
    /// When a broker is gone, wait for it to come back instead of ending
    #[arg(long)]
    pub reconnect: bool,
    /// In a guest: wait for a device that is not there yet, serve it, and when it is gone wait for the next
    #[arg(long)]
    pub wait_for_device: bool,
}

impl RunArgs {
    /// Whether it is to end, so long after the first packet.
    pub(super) fn is_over(&self, running: Duration) -> bool {
        self.seconds.is_some_and(|seconds| running.as_secs_f64() >= seconds)
    }
}

/// What SIGTERM and SIGINT ask for from now on.
pub(super) fn stop_on_signals() -> Result<Stop, ProgramError> {
    Stop::on_signals().map_err(|source| ProgramError::System { what: "signal handlers", source })
}

/// What a program does when who it works with is not there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Patience {
    /// It waits for it to come back.
    reconnect: bool,
    /// It waits also for the first one.
    from_start: bool,
}

impl Patience {
    /// By the options of these names.
    pub const fn new(reconnect: bool, wait_for_device: bool) -> Self {
        Self { reconnect: reconnect || wait_for_device, from_start: wait_for_device }
    }
}

impl RunArgs {
    /// What the program was told.
    pub(super) fn patience(&self) -> Patience {
        Patience::new(self.reconnect, self.wait_for_device)
    }

    /// Whether it waits for who is gone to come back.
    pub(super) fn reconnects(&self) -> bool {
        self.reconnect || self.wait_for_device
    }
}

/// A time without a broker, or a device.
#[derive(Debug, Default)]
pub(super) struct Outage {
    said: bool,
    was_there: bool,
}

impl Outage {
    /// It is back: the next outage is another one.
    pub fn is_over(&mut self) {
        *self = Self { said: false, was_there: true };
    }
}

/// Runs `once`, which connects and then works until it is to end. Where it finds that who it works with
/// is gone, or not there yet, and `patience` says so, it is run again, until `stop` is requested.
pub(super) fn until_gone(
    patience: Patience,
    stop: &Stop,
    mut once: impl FnMut(&mut Outage) -> Result<(), ProgramError>,
) -> Result<(), ProgramError> {
    let mut outage = Outage { was_there: patience.from_start, ..Outage::default() };
    loop {
        let gone = match once(&mut outage) {
            Err(error) if patience.reconnect && error.is_gone(outage.was_there) => error,
            result => return result,
        };
        if stop.is_requested() {
            return Ok(());
        }
        if !std::mem::replace(&mut outage.said, true) {
            tracing::warn!(
                "{gone}; waiting for {}",
                if patience.from_start { "one" } else { "it to come back" }
            );
        }
        std::thread::sleep(RECONNECT_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::TransportError;
    use crate::transport::sysfs::Kind;

    fn nothing() -> ProgramError {
        ProgramError::Transport(TransportError::NotFound { kind: Kind::VhostPci, tried: Vec::new() })
    }

    fn gone() -> ProgramError {
        ProgramError::BrokerGone { socket: "/x".to_owned() }
    }

    #[test]
    fn only_what_may_come_back_is_waited_for_and_only_if_asked_for() {
        let stop = Stop::default();
        let patience = |reconnect| Patience { reconnect, from_start: false };
        let run = |reconnect: bool, ends: &mut dyn FnMut() -> Result<(), ProgramError>| {
            let mut times = 0;
            let result = until_gone(patience(reconnect), &stop, |outage| {
                // It comes back each time, and is gone again.
                outage.is_over();
                times += 1;
                ends()
            });
            (result, times)
        };
        assert!(matches!(run(false, &mut || Err(gone())), (Err(ProgramError::BrokerGone { .. }), 1)));
        assert!(matches!(run(true, &mut || Err(ProgramError::NoDevice)), (Err(ProgramError::NoDevice), 1)));
        let mut unplugged = [Ok(()), Err(nothing())].into_iter().rev();
        assert!(matches!(run(true, &mut || unplugged.next().unwrap_or(Ok(()))), (Ok(()), 2)));
        // Who waits from the start has one that is not there yet, too.
        let mut plugged = [Err(nothing()), Ok(())].into_iter();
        let patient = Patience { reconnect: true, from_start: true };
        assert!(until_gone(patient, &stop, |_| plugged.next().unwrap_or(Ok(()))).is_ok());
        assert!(plugged.next().is_none(), "it was tried again");
        let never = until_gone(patience(true), &stop, |_| Err(nothing()));
        assert!(matches!(never, Err(ProgramError::Transport(TransportError::NotFound { .. }))));
        let mut left = [Ok(()), Err(gone()), Err(gone())].into_iter().rev();
        assert!(matches!(run(true, &mut || left.next().unwrap_or(Ok(()))), (Ok(()), 3)));
        stop.request();
        assert!(matches!(run(true, &mut || Err(gone())), (Ok(()), 1)));
    }
}
