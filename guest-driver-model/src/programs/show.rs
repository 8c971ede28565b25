//! `show`: what the device and the link look like, as JSON.

use serde_json::{Value, json};

use super::ProgramError;
use super::device::DeviceArgs;
use super::quantity::seconds;
use crate::link::LinkPage;
use crate::transport::Transport;

/// What `show` can be told.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct ShowArgs {
    /// The device.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Wait up to this many seconds for the link to be up
    #[arg(long, default_value_t = 0.0, value_name = "SECONDS", value_parser = seconds)]
    pub wait: f64,
}

/// Runs `show`.
///
/// # Errors
/// If the device cannot be had.
pub fn run(args: &ShowArgs) -> Result<(), ProgramError> {
    let transport = args.device.open()?;
    let page = LinkPage::new(transport.window(), transport.config())?;
    let start = std::time::Instant::now();
    while start.elapsed().as_secs_f64() < args.wait && !page.snapshot().is_ok_and(|snapshot| snapshot.up) {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let text = serde_json::to_string_pretty(&describe(&*transport, &page));
    super::say(&text.unwrap_or_default());
    Ok(())
}

fn describe(transport: &dyn Transport, page: &LinkPage) -> Value {
    let config = transport.config();
    let link = match page.snapshot() {
        Err(error) => json!({ "error": error.to_string() }),
        Ok(snapshot) => json!({
            "generation": snapshot.generation,
            "owner": snapshot.owner,
            "up": snapshot.up,
            "iommu": snapshot.iommu,
            "copy": snapshot.copy,
            "table_generation": snapshot.table_generation,
            "owner_device": snapshot.owner_device,
            "features": format!("{:#x}", snapshot.features),
            "mappings": snapshot.mappings.iter().map(|mapping| json!({
                "iova": format!("{:#x}", mapping.iova),
                "len": format!("{:#x}", mapping.len),
                "window_offset": format!("{:#x}", mapping.window_offset),
                "access": mapping.access.bits(),
            })).collect::<Vec<_>>(),
            "vrings": snapshot.vrings.iter().map(|vring| json!({
                "enabled": vring.enabled,
                "size": vring.size,
                "desc": format!("{:#x}", vring.desc),
                "avail": format!("{:#x}", vring.avail),
                "used": format!("{:#x}", vring.used),
                "base": vring.base,
            })).collect::<Vec<_>>(),
        }),
    };
    json!({
        "device": transport.name(),
        "interrupts": transport.interrupt_fd(0).is_some(),
        "max_vrings": config.max_vrings.value(),
        "window_len": config.window_len.value(),
        "max_mappings": config.max_mappings.value(),
        "link": link,
    })
}
