//! `probe`: tries to read and to change a page of the owner's by every way there is, and
//! says what the device answered.

use serde_json::json;
use vhost_pci_device::abi::PAGE_SIZE;

use super::secret::Secret;
use super::window::{Window, name};
use crate::programs::ProgramError;
use crate::programs::device::DeviceArgs;
use crate::translate::Access;

/// What `probe` can be told.
#[derive(Clone, Debug, clap::Args)]
pub struct ProbeArgs {
    /// The device.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Where the owner's card finds the page
    #[arg(long, value_name = "ADDRESS")]
    pub iova: u64,
    /// The secret in it
    #[arg(long, value_name = "SEED")]
    pub secret: u64,
    /// How often to fetch it: a device that finds a page in use may come to map it
    #[arg(long, default_value_t = 1)]
    pub fetches: u32,
    /// In the end, write over every page of the window in which nothing is mapped
    #[arg(long)]
    pub spray: bool,
}

/// What is written where nothing may be.
const GRAFFITI: u8 = 0xa5;

/// Runs `probe`.
///
/// # Errors
/// If the device cannot be had, or has no link.
pub fn run(args: &ProbeArgs) -> Result<(), ProgramError> {
    let transport = args.device.open()?;
    let mut window = Window::open(&*transport)?;
    let secret = Secret::new(args.secret).bytes();

    let mut right = 0;
    let mut fetched = Vec::new();
    for _ in 0..args.fetches {
        let mut page = [0; PAGE_SIZE as usize];
        fetched.push(name(window.fetch(args.iova, &mut page)?));
        right += u32::from(page.chunks_exact(secret.len()).all(|bytes| bytes == secret));
    }
    fetched.dedup();
    let mut graffiti = [GRAFFITI; PAGE_SIZE as usize];
    let stored = [window.store(args.iova, &mut graffiti)?, window.store(args.iova + 8, &mut graffiti[..8])?];

    let mut mapped = Vec::new();
    for access in [Access::READ, Access::WRITE, Access::READ_WRITE] {
        let answer = window.map(args.iova, PAGE_SIZE as u32, access)?;
        // What the table allows is to be taken at its word.
        if let Ok(page) = &answer
            && access.allows(Access::WRITE)
        {
            page.write(0, &graffiti)?;
        }
        mapped.push(answer.err().map_or("done", name));
    }
    let line = json!({
        "fetch": fetched,
        "fetched_right": right,
        "store": stored.map(name),
        "map_read": mapped.first(),
        "map_write": mapped.get(1),
        "map_read_write": mapped.get(2),
        "in_table": window.place(args.iova, PAGE_SIZE as u32, Access::NONE)?.is_some(),
        "sprayed_pages": if args.spray { spray(&window, &graffiti)? } else { 0 },
    });
    crate::programs::say(&line.to_string());
    Ok(())
}

/// Writes over every page of the window that is not the device's own and in which nothing
/// is mapped. Returns how many.
fn spray(window: &Window<'_>, graffiti: &[u8; PAGE_SIZE as usize]) -> Result<u64, ProgramError> {
    let memory = window.memory();
    let mut pages = 0;
    let mut from = window.data_offset();
    let mut mappings: Vec<_> =
        window.mappings()?.iter().map(|mapping| (mapping.window_offset, mapping.len)).collect();
    mappings.sort_unstable();
    // The window's end ends the last gap.
    mappings.push((memory.len(), 0));
    for (start, len) in mappings {
        for offset in (from..start).step_by(PAGE_SIZE as usize) {
            memory.write(offset, graffiti)?;
            pages += 1;
        }
        from = from.max(start + len);
    }
    Ok(pages)
}
