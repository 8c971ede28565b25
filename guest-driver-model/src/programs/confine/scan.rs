//! `scan`: reads every page of the window and says in how many of them a secret stands.

use serde_json::json;
use vhost_pci_device::abi::PAGE_SIZE;

use super::secret::Secret;
use super::window::Window;
use crate::programs::ProgramError;
use crate::programs::device::DeviceArgs;
use crate::shm::{SharedMemory, ShmError};

/// What `scan` can be told.
#[derive(Clone, Debug, clap::Args)]
pub struct ScanArgs {
    /// The device.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// The secret
    #[arg(long, value_name = "SEED")]
    pub secret: u64,
}

/// Offsets that are named in the report.
const NAMED: usize = 16;

/// What a search of the window found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Pages read.
    pub pages: u64,
    /// Pages that hold something else than zeros.
    pub filled: u64,
    /// Pages that hold the secret.
    pub with_secret: u64,
    /// Window offsets of the first of these.
    pub at: Vec<u64>,
}

/// Runs `scan`.
///
/// # Errors
/// If the device cannot be had, or has no link.
pub fn run(args: &ScanArgs) -> Result<(), ProgramError> {
    let transport = args.device.open()?;
    let window = Window::open(&*transport)?;
    let found = search(window.memory(), Secret::new(args.secret))?;
    let line = json!({
        "pages": found.pages,
        "filled": found.filled,
        "with_secret": found.with_secret,
        "at": found.at,
    });
    crate::programs::say(&line.to_string());
    Ok(())
}

/// Looks into every page, at every byte.
///
/// # Errors
/// None for a window that is as long as it says.
pub fn search(window: &SharedMemory, secret: Secret) -> Result<Found, ShmError> {
    let secret = secret.bytes();
    let mut page = [0; PAGE_SIZE as usize];
    let mut found = Found::default();
    for offset in (0..window.len()).step_by(PAGE_SIZE as usize) {
        let len = (window.len() - offset).min(PAGE_SIZE) as usize;
        let Some(page) = page.get_mut(..len) else { continue };
        window.read(offset, page)?;
        found.pages += 1;
        // Most of a window is empty: that is seen fast.
        if page.iter().all(|byte| *byte == 0) {
            continue;
        }
        found.filled += 1;
        if page.windows(secret.len()).any(|bytes| bytes == secret) {
            found.with_secret += 1;
            if found.at.len() < NAMED {
                found.at.push(offset);
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::shm::mapping::MappedRange;
    use std::sync::Arc;

    #[test]
    fn a_secret_is_found_in_its_page_wherever_it_starts() {
        let window = Arc::new(MappedRange::locked_pages(8 * PAGE_SIZE as usize).unwrap()).shared();
        let (secret, other) = (Secret::new(7), Secret::new(8));
        assert_eq!(search(&window, secret).unwrap(), Found { pages: 8, ..Found::default() });
        window.write(3 * PAGE_SIZE + 13, &secret.bytes()).unwrap();
        other.fill(&window.part(5 * PAGE_SIZE, PAGE_SIZE).unwrap()).unwrap();
        let found = search(&window, secret).unwrap();
        let expected = Found { pages: 8, filled: 2, with_secret: 1, at: vec![3 * PAGE_SIZE] };
        assert_eq!(found, expected);
        // One byte less is none.
        window.store_u16(3 * PAGE_SIZE + 14, 0).unwrap();
        assert_eq!(search(&window, secret).unwrap().with_secret, 0);
        assert_eq!(search(&window, other).unwrap().at, [5 * PAGE_SIZE]);
    }

    #[test]
    fn a_page_is_full_of_its_secret_until_a_word_changes() {
        let page = Arc::new(MappedRange::locked_pages(Secret::LEN as usize).unwrap()).shared();
        let secret = Secret::new(1);
        secret.fill(&page).unwrap();
        assert!(secret.is_in(&page).unwrap() && !Secret::new(2).is_in(&page).unwrap());
        let word = page.load_u64(4088).unwrap();
        assert!(secret.words().contains(&word) && !Secret::new(2).words().contains(&word));
        page.store_u64(4088, word ^ 1).unwrap();
        assert!(!secret.is_in(&page).unwrap());
    }
}
