//! A thread that rewrites memory while it is being read, as an owner's other processors would.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread;

use guest_driver_model::shm::SharedMemory;

use crate::input::Input;

/// Words to be written, over and over: where, and what.
#[derive(Debug)]
struct Job {
    memory: SharedMemory,
    words: Vec<(u64, u16)>,
    stop: Arc<AtomicBool>,
}

struct Thread {
    jobs: Sender<Job>,
    done: std::sync::Mutex<Receiver<()>>,
}

/// The memory is being rewritten as long as this lives.
#[derive(Debug)]
pub struct Scribbling(Arc<AtomicBool>);

/// Starts to write these words of this memory. Those outside are left out.
pub fn scribble(memory: &SharedMemory, words: Vec<(u64, u16)>) -> Scribbling {
    let stop = Arc::new(AtomicBool::new(false));
    let job = Job { memory: memory.clone(), words, stop: Arc::clone(&stop) };
    the_thread().jobs.send(job).expect("it never ends");
    Scribbling(stop)
}

/// Up to eight words by the fuzzer's choice, each even offset of the first `len` bytes.
pub fn words(input: &mut Input<'_>, len: u64) -> Vec<(u64, u16)> {
    (0..=input.below(8)).map(|_| (u64::from(input.word()) * 2 % len, input.word())).collect()
}

impl Drop for Scribbling {
    fn drop(&mut self) {
        // Relaxed: the answer orders it.
        self.0.store(true, Ordering::Relaxed);
        let done = the_thread().done.lock().expect("no panic is survived");
        done.recv().expect("it never ends");
    }
}

fn the_thread() -> &'static Thread {
    static THREAD: OnceLock<Thread> = OnceLock::new();
    THREAD.get_or_init(|| {
        let (jobs, todo) = channel::<Job>();
        let (tell, done) = channel();
        thread::spawn(move || {
            for job in todo {
                while !job.stop.load(Ordering::Relaxed) {
                    for &(at, word) in &job.words {
                        let _ = job.memory.store_u16(at, word);
                    }
                    thread::yield_now();
                }
                let _ = tell.send(());
            }
        });
        Thread { jobs, done: std::sync::Mutex::new(done) }
    })
}
