//! What each process was shown of another's memory, in the window of a peer. A VMM can count a window as
//! memory of its VM, as QEMU does, and tell it to the back-ends of its VM's other devices: where its VM is
//! an owner, too, another link's owner would be shown to that link's peer. It never is.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Files of others remembered of one window: those that were shown last. An owner that has more shown than that
/// exposes nothing but its own memory.
const MOST: usize = 4096;

/// A file: its device and inode numbers.
pub type Identity = (u64, u64);

#[derive(Debug)]
struct Window {
    number: u64,
    process: i32,
    /// The owner's.
    files: VecDeque<Identity>,
    /// The broker's own, until they are forgotten: a window has a handful at a time.
    own: Vec<Identity>,
}

#[derive(Debug, Default)]
struct Windows {
    next: u64,
    list: Vec<Window>,
}

/// The windows of all links of a broker.
#[derive(Clone, Debug, Default)]
pub struct Shown(Arc<Mutex<Windows>>);

impl Shown {
    fn windows(&self) -> MutexGuard<'_, Windows> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A window in which nothing was shown yet, of a process.
    pub fn window(&self, process: i32) -> ShownWindow {
        let mut windows = self.windows();
        windows.next += 1;
        let number = windows.next;
        windows.list.push(Window { number, process, files: VecDeque::new(), own: Vec::new() });
        ShownWindow { shown: self.clone(), number, process }
    }

    /// Whether this process has the file from us.
    pub fn has(&self, process: i32, file: Identity) -> bool {
        let windows = self.windows();
        let has = |window: &Window| window.files.contains(&file) || window.own.contains(&file);
        windows.list.iter().any(|window| window.process == process && has(window))
    }
}

/// One of them. It is forgotten when this is dropped.
#[derive(Debug)]
pub struct ShownWindow {
    shown: Shown,
    number: u64,
    process: i32,
}

impl ShownWindow {
    /// Notes, before it is shown, a file that came from `from`. What a process told us of itself is its own: it has
    /// several VMs, or the kernel does not say which process it is.
    pub fn note(&self, file: Identity, from: i32) {
        if from == self.process {
            return;
        }
        self.change(|window| {
            // What is shown again is among the last.
            window.files.retain(|noted| *noted != file);
            if window.files.len() == MOST {
                window.files.pop_front();
            }
            window.files.push_back(file);
        });
    }

    /// Notes, before it is shown, a file of the broker's own, until it is forgotten.
    pub fn note_own(&self, file: Identity) {
        self.change(|window| {
            if !window.own.contains(&file) {
                window.own.push(file);
            }
        });
    }

    /// A file of the broker's own is in the window no more, and will not be again.
    pub fn forget_own(&self, file: Identity) {
        self.change(|window| window.own.retain(|noted| *noted != file));
    }

    fn change(&self, change: impl FnOnce(&mut Window)) {
        let mut windows = self.shown.windows();
        if let Some(window) = windows.list.iter_mut().find(|window| window.number == self.number) {
            change(window);
        }
    }
}

impl Drop for ShownWindow {
    fn drop(&mut self) {
        self.shown.windows().list.retain(|window| window.number != self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_process_was_shown_is_not_its_own_until_its_window_is_gone() {
        let shown = Shown::default();
        let (first, second) = (shown.window(7), shown.window(7));
        first.note((1, 10), 6);
        second.note((1, 11), 5);
        assert!(shown.has(7, (1, 10)) && shown.has(7, (1, 11)));
        assert!(!shown.has(6, (1, 10)), "who it came from has it of itself");
        assert!(!shown.has(7, (2, 10)));
        drop(first);
        assert!(!shown.has(7, (1, 10)) && shown.has(7, (1, 11)));
    }

    #[test]
    fn a_process_that_is_owner_and_peer_of_one_link_keeps_its_own_memory() {
        let shown = Shown::default();
        let window = shown.window(7);
        window.note((1, 10), 7);
        assert!(!shown.has(7, (1, 10)));
    }

    #[test]
    fn a_window_remembers_so_many_files_and_those_that_were_shown_last() {
        let shown = Shown::default();
        let window = shown.window(7);
        let (again, once) = ((1, 0), (1, 1));
        window.note(again, 6);
        window.note(once, 6);
        (2..MOST as u64).for_each(|inode| window.note((1, inode), 6));
        window.note(again, 6);
        (MOST as u64..2 * MOST as u64 - 1).for_each(|inode| window.note((1, inode), 6));
        assert!(shown.has(7, again) && shown.has(7, (1, MOST as u64)) && !shown.has(7, once));
        assert_eq!(shown.windows().list.iter().map(|window| window.files.len()).sum::<usize>(), MOST);
    }

    #[test]
    fn the_brokers_own_pages_that_come_and_go_displace_nothing_and_are_forgotten() {
        let shown = Shown::default();
        let window = shown.window(7);
        let (owners, areas, last) = ((1, 0), (1, 1), (1, 2 * MOST as u64));
        window.note(owners, 6);
        window.note_own(areas);
        window.note_own(areas);
        for inode in 2..last.1 {
            window.note_own((1, inode));
            assert!(shown.has(7, (1, inode)));
            window.forget_own((1, inode));
        }
        window.note_own(last);
        assert!([owners, areas, last].into_iter().all(|file| shown.has(7, file)) && !shown.has(7, (1, 2)));
        assert_eq!(shown.windows().list[0].own, [areas, last]);
    }
}
