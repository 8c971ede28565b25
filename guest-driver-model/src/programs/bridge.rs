//! `bridge`: a peer of many owners, and a learning switch between them: out of the buffers of one straight into
//! those of another, with one copy for each owner that is to have a packet.
//!
//! Owns: the devices. One that is gone takes its port with it, and the others go on. Where frames go is
//! [`switch`]'s, and what moves them `serve`'s.
//!
//! | module | what it holds |
//! |---|---|
//! | [`frame`] | what is looked at of a frame |
//! | [`table`] | behind which port a station is |
//! | [`storm`] | how much a port may have flooded |
//! | [`switch`] | where each frame goes |
//! | [`counters`] | what is counted by port |
//! | `serve` | moves the packets, and waits for them |
//! | `burst` | a burst, from its loan to the copies |

mod burst;
pub mod counters;
pub mod frame;
mod serve;
pub mod storm;
pub mod switch;
pub mod table;

use std::time::Duration;

use self::counters::PortReport;
use self::serve::{Bridge, Ended};
use self::switch::MAX_PORTS;
use self::table::Limits;
use super::ProgramError;
use super::device::{DeviceArgs, ManyDevicesArgs};
use super::quantity::positive;
use super::run::{RunArgs, stop_on_signals};
use super::stop::Stop;
use super::traffic::Traffic;
use crate::transport::Transport;

/// What `bridge` can be told.
#[derive(Clone, Debug, clap::Args)]
pub struct BridgeArgs {
    /// The devices.
    #[command(flatten)]
    pub devices: ManyDevicesArgs,
    /// How to run.
    #[command(flatten)]
    pub run: RunArgs,
    /// Forget a station that has sent nothing for so many seconds
    #[arg(long, default_value_t = 300.0, value_name = "SECONDS", value_parser = positive)]
    pub ageing: f64,
    /// The most stations to know behind each port; frames to others go to all ports
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub stations: u32,
    /// The most frames of each port in a second that are copied to all others: broadcasts, multicasts, and
    /// frames to stations that nobody has heard of. More are dropped, and counted
    #[arg(long, default_value_t = 10_000, value_name = "PACKETS", value_parser = clap::value_parser!(u32).range(1..))]
    pub flood_limit: u32,
    /// End after this many packets, all ports together
    #[arg(long)]
    pub packets: Option<u64>,
}

impl Default for BridgeArgs {
    fn default() -> Self {
        Self {
            devices: ManyDevicesArgs::default(),
            run: RunArgs::default(),
            ageing: 300.0,
            stations: 1024,
            flood_limit: 10_000,
            packets: None,
        }
    }
}

impl BridgeArgs {
    fn limits(&self) -> Limits {
        Limits { ageing: Duration::from_secs_f64(self.ageing), stations: self.stations as usize }
    }
}

/// Runs `bridge`.
///
/// # Errors
/// If a device cannot be had, or all are gone.
pub fn run(args: &BridgeArgs) -> Result<(), ProgramError> {
    let stop = stop_on_signals()?;
    run_until(args, &stop)
}

/// As [`run`], until `stop` is requested.
///
/// # Errors
/// As [`run`].
pub fn run_until(args: &BridgeArgs, stop: &Stop) -> Result<(), ProgramError> {
    let devices = args.devices.all(MAX_PORTS)?;
    let name = |device: &DeviceArgs| {
        let socket = device.socket.as_ref().map(|path| path.display().to_string());
        device.device.clone().or(socket).unwrap_or_default()
    };
    let open = |port: usize| devices.get(port).ok_or(ProgramError::NoDevice)?.open();
    let mut bridge = Bridge::new(args, stop, devices.iter().map(name).collect());
    let transports = start(devices.len(), &open, args, &mut bridge)?;
    let result = serve(transports, &open, args, &mut bridge);
    bridge.end();
    result
}

/// Starts the device of a port.
pub type Open<'o, 'd> = dyn Fn(usize) -> Result<Box<dyn Transport + 'd>, ProgramError> + 'o;

/// As [`run_until`], for ports of these names, whose devices `open` starts. Returns what was moved, and each
/// port's part of that, and prints it nowhere at the end.
///
/// # Errors
/// As [`run`].
pub fn run_with<'d>(
    names: Vec<String>,
    open: &Open<'_, 'd>,
    args: &BridgeArgs,
    stop: &Stop,
) -> (Result<(), ProgramError>, Traffic, Vec<PortReport>) {
    let ports = names.len();
    let mut bridge = Bridge::new(args, stop, names);
    let result = start(ports, open, args, &mut bridge)
        .and_then(|transports| serve(transports, open, args, &mut bridge));
    let (traffic, reports) = bridge.report();
    (result, traffic, reports)
}

/// What each port has, if its device is there.
type Transports<'d> = Vec<Option<Box<dyn Transport + 'd>>>;

fn start<'d>(
    ports: usize,
    open: &Open<'_, 'd>,
    args: &BridgeArgs,
    bridge: &mut Bridge<'_>,
) -> Result<Transports<'d>, ProgramError> {
    let mut transports = Vec::with_capacity(ports);
    for port in 0..ports {
        transports.push(match open(port) {
            Ok(transport) => {
                tracing::info!(device = transport.name(), port, "the device is started");
                bridge.is_called(port, transport.name());
                Some(transport)
            }
            Err(error) if args.run.wait_for_device && error.is_gone(true) => {
                tracing::warn!(port, "{error}; waiting for one");
                None
            }
            // One that is not there is a mistake in its address.
            Err(error) => return Err(error),
        });
    }
    Ok(transports)
}

fn serve<'d>(
    mut transports: Transports<'d>,
    open: &Open<'_, 'd>,
    args: &BridgeArgs,
    bridge: &mut Bridge<'_>,
) -> Result<(), ProgramError> {
    // It is tried again: why it is not there says nothing new.
    let reopen = |port: usize| open(port).ok();
    loop {
        let borrowed: Vec<_> = transports.iter().map(Option::as_deref).collect();
        let ended = bridge.drive(&borrowed, args.run.reconnects().then_some(&reopen));
        match ended {
            Ended::Asked => return Ok(()),
            // Let go of at once: the kernel may be waiting for that.
            Ended::Gone(port, error) => {
                transports.iter_mut().skip(port).take(1).for_each(|transport| *transport = None);
                let is_last = transports.iter().all(Option::is_none) && !args.run.reconnects();
                if is_last || matches!(error, ProgramError::NoInterrupts { .. }) {
                    return Err(error);
                }
                tracing::warn!("{error}; the other ports go on");
            }
            Ended::Back(port, back) => {
                tracing::info!(device = back.name(), port, "the device is started again");
                bridge.is_called(port, back.name());
                transports.iter_mut().skip(port).take(1).zip([back]).for_each(|(at, back)| *at = Some(back));
            }
        }
    }
}
