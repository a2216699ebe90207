//! A queue of images that threads decode before they are needed.

use std::any::Any;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::data::DataError;

/// How often a wait for images looks whether it should stop.
const LOOK: Duration = Duration::from_millis(50);

/// Images that are used together.
pub(super) struct Part {
    /// The number of each in its split.
    pub samples: Vec<u32>,
    /// Of all of them, NHWC.
    pub pixels: Vec<u8>,
}

/// Parts in the order of their use. Threads decode the images of the next `ahead` parts and then wait, so the queue
/// holds `ahead` parts and the one in use, and each thread one image. With 0 they decode a part while it is waited for,
/// and leave the processor to others at any other time. The threads end when the queue is dropped.
pub(super) struct Queue {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    in_use: Option<Part>,
}

type Parts = Box<dyn Iterator<Item = Vec<u32>> + Send>;
type Decode = Box<dyn Fn(u32) -> Result<Vec<u8>, DataError> + Send + Sync>;

/// Why an image was not decoded.
enum Failure {
    Error(DataError),
    Panic(Box<dyn Any + Send>),
}

struct Shared {
    state: Mutex<State>,
    /// A part was completed or taken, or the queue was dropped.
    changed: Condvar,
    decode: Decode,
    /// Bytes of an image.
    image: usize,
    ahead: usize,
}

struct State {
    to_come: Parts,
    open: VecDeque<Open>,
    /// The number of the first open part.
    first: u64,
    /// Memory of parts that have been used.
    free: Vec<Vec<u8>>,
    /// Whether a part is waited for.
    wanted: bool,
    /// Whether no further image is needed.
    ended: bool,
}

/// A part, of which some images have been begun and some are done.
struct Open {
    part: Part,
    begun: usize,
    done: usize,
    /// The first image that could not be decoded.
    failed: Option<(usize, Failure)>,
}

/// An image to decode.
struct Task {
    part: u64,
    place: usize,
    sample: u32,
}

impl Queue {
    /// Begins with the first of these parts. `decode` gives the `image` bytes of a sample.
    pub fn new(
        parts: impl Iterator<Item = Vec<u32>> + Send + 'static,
        image: usize,
        ahead: usize,
        threads: usize,
        decode: impl Fn(u32) -> Result<Vec<u8>, DataError> + Send + Sync + 'static,
    ) -> Self {
        let (open, free) = (VecDeque::new(), Vec::new());
        let state = State { to_come: Box::new(parts), open, first: 0, free, wanted: false, ended: false };
        let (state, decode) = (Mutex::new(state), Box::new(decode));
        let shared = Arc::new(Shared { state, changed: Condvar::new(), decode, image, ahead });
        let thread = || {
            let shared = shared.clone();
            thread::Builder::new().spawn(move || shared.work())
        };
        // Where no thread can be made, whoever takes a part decodes it.
        let threads = (0..threads).map_while(|_| thread().ok()).collect();
        Self { shared, threads, in_use: None }
    }

    /// The next part, which stays until the next call. None if `stop` is set before it is complete, and after the last.
    ///
    /// # Errors
    /// The error of the first of its images that could not be decoded.
    pub fn next(&mut self, stop: &AtomicBool) -> Result<Option<&Part>, DataError> {
        let shared = &self.shared;
        let mut state = shared.lock();
        if let Some(used) = self.in_use.take() {
            state.free.push(used.pixels);
        }
        state.wanted = true;
        shared.changed.notify_all();
        while !stop.load(Ordering::Relaxed) {
            if state.open.front().is_some_and(|open| open.done == open.part.samples.len()) {
                let Some(Open { part, failed, .. }) = state.open.pop_front() else { break };
                (state.first, state.wanted) = (state.first + 1, false);
                shared.changed.notify_all();
                return match failed {
                    None => Ok(Some(self.in_use.insert(part))),
                    Some((_, Failure::Error(error))) => Err(error),
                    Some((_, Failure::Panic(panic))) => resume_unwind(panic),
                };
            }
            // It helps with the part that it waits for.
            if let Some(task) = state.task(1, shared.image) {
                state = shared.decode(state, task);
            } else if state.open.is_empty() {
                break;
            } else {
                state = shared.changed.wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        state.wanted = false;
        Ok(None)
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            // A panic of a decoder has been caught.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What each thread does.
    fn work(&self) {
        let mut state = self.lock();
        while !state.ended {
            let most = self.ahead.max(usize::from(state.wanted));
            state = match state.task(most, self.image) {
                Some(task) => self.decode(state, task),
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// Decodes an image, without the lock, and puts it in its place.
    fn decode<'a>(&'a self, state: MutexGuard<'a, State>, task: Task) -> MutexGuard<'a, State> {
        drop(state);
        let decoded = match catch_unwind(AssertUnwindSafe(|| (self.decode)(task.sample))) {
            Ok(decoded) => decoded.map_err(Failure::Error),
            Err(panic) => Err(Failure::Panic(panic)),
        };
        let mut state = self.lock();
        if state.put(&task, decoded, self.image) {
            self.changed.notify_all();
        }
        state
    }
}

impl State {
    /// The next image of the first `most` parts that nobody has begun. It opens parts as they are needed.
    fn task(&mut self, most: usize, image: usize) -> Option<Task> {
        loop {
            let waiting = |open: &Open| open.begun < open.part.samples.len();
            if let Some(index) = self.open.iter().take(most).position(waiting) {
                let Open { part, begun, .. } = &mut self.open[index];
                *begun += 1;
                let place = *begun - 1;
                return Some(Task { part: self.first + index as u64, place, sample: part.samples[place] });
            }
            if self.open.len() >= most {
                return None;
            }
            let samples = self.to_come.next()?;
            let mut pixels = self.free.pop().unwrap_or_default();
            pixels.resize(samples.len() * image, 0);
            self.open.push_back(Open { part: Part { samples, pixels }, begun: 0, done: 0, failed: None });
        }
    }

    /// Takes in an image. Returns whether its part is complete now.
    fn put(&mut self, task: &Task, decoded: Result<Vec<u8>, Failure>, image: usize) -> bool {
        // A part is taken only when all of its images are done, so it is still there.
        let Some(open) = self.open.get_mut((task.part - self.first) as usize) else { return false };
        match decoded {
            Ok(pixels) => open.part.pixels[task.place * image..(task.place + 1) * image].copy_from_slice(&pixels),
            Err(failure) if open.failed.as_ref().is_none_or(|(place, _)| task.place < *place) => {
                open.failed = Some((task.place, failure));
            }
            Err(_) => {}
        }
        open.done += 1;
        open.done == open.part.samples.len()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    const IMAGE: usize = 3;

    fn decoded(sample: u32) -> Vec<u8> {
        vec![sample as u8, (sample + 1) as u8, (sample >> 8) as u8]
    }

    fn parts(count: u32) -> impl Iterator<Item = Vec<u32>> + Send {
        (0..count).map(|part| vec![7 * part, 7 * part + 3, part, part])
    }

    fn wait_until(what: &str, is_so: impl Fn() -> bool) {
        let start = std::time::Instant::now();
        while !is_so() {
            assert!(start.elapsed() < Duration::from_secs(20), "{what}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn parts_come_in_their_order_whoever_decodes_them() {
        let go_on = AtomicBool::new(false);
        for threads in [0, 1, 5] {
            for ahead in [0, 1, 3] {
                let mut queue = Queue::new(parts(40), IMAGE, ahead, threads, |sample| {
                    // Later images are often ready first.
                    thread::sleep(Duration::from_micros(u64::from(sample * 37 % 5) * 50));
                    Ok(decoded(sample))
                });
                for expected in parts(40) {
                    let part = queue.next(&go_on).unwrap().unwrap();
                    assert_eq!(part.samples, expected);
                    assert_eq!(part.pixels, expected.into_iter().flat_map(decoded).collect::<Vec<_>>());
                }
                assert!(queue.next(&go_on).unwrap().is_none(), "after the last part");
            }
        }
    }

    /// The bound is on the images that have been begun, so on the memory for them, too.
    #[test]
    fn no_more_is_decoded_than_is_asked_for() {
        for ahead in [0, 2] {
            let begun = Arc::new(AtomicUsize::new(0));
            let count = begun.clone();
            let mut queue = Queue::new(parts(100), IMAGE, ahead, 4, move |sample| {
                count.fetch_add(1, Ordering::Relaxed);
                Ok(decoded(sample))
            });
            for taken in 0..5 {
                let most = 4 * (taken + ahead);
                wait_until("the parts ahead are decoded", || begun.load(Ordering::Relaxed) == most);
                thread::sleep(Duration::from_millis(20));
                assert_eq!(begun.load(Ordering::Relaxed), most, "{taken} parts were taken");
                queue.next(&AtomicBool::new(false)).unwrap();
                let state = queue.shared.lock();
                let held = state.open.len() + state.free.len() + usize::from(queue.in_use.is_some());
                assert!(held <= ahead + 1, "{held} parts are in memory");
            }
        }
    }

    #[test]
    fn the_first_image_of_a_part_that_fails_is_named_when_its_turn_comes() {
        let go_on = AtomicBool::new(false);
        for threads in [0, 3] {
            let mut queue = Queue::new(parts(6), IMAGE, 4, threads, |sample| match sample {
                // Images of the third part.
                14 => {
                    thread::sleep(Duration::from_millis(10));
                    Err(DataError::PictureChanged { path: "first".into() })
                }
                17 => Err(DataError::PictureChanged { path: "second".into() }),
                _ => Ok(decoded(sample)),
            });
            assert!(queue.next(&go_on).unwrap().is_some() && queue.next(&go_on).unwrap().is_some());
            let error = queue.next(&go_on).err().unwrap().to_string();
            assert!(error.starts_with("first: "), "{error}");
        }
    }

    #[test]
    fn a_panic_of_a_decoder_reaches_whoever_takes_the_part() {
        let mut queue = Queue::new(parts(1), IMAGE, 1, 2, |_| panic!("a damaged decoder"));
        let found = catch_unwind(AssertUnwindSafe(|| queue.next(&AtomicBool::new(false)).is_ok()));
        assert_eq!(found.unwrap_err().downcast_ref::<&str>(), Some(&"a damaged decoder"));
    }

    #[test]
    fn a_full_queue_ends_its_threads_when_it_is_dropped() {
        let alive = Arc::new(());
        let held = alive.clone();
        let queue = Queue::new(parts(1000), IMAGE, 2, 3, move |sample| {
            let _ = &held;
            Ok(decoded(sample))
        });
        wait_until("the queue is full", || queue.shared.lock().open.iter().filter(|open| open.done == 4).count() == 2);
        drop(queue);
        assert_eq!(Arc::strong_count(&alive), 1, "a thread still has the decoder");
    }

    #[test]
    fn a_wait_ends_when_it_is_stopped() {
        let (stop, wait) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(true)));
        let waits = wait.clone();
        let mut queue = Queue::new(parts(3), IMAGE, 1, 4, move |sample| {
            while waits.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(1));
            }
            Ok(decoded(sample))
        });
        // All images of the part are begun by the threads, so that the wait is for them.
        wait_until("the part is begun", || queue.shared.lock().open.front().is_some_and(|open| open.begun == 4));
        let stopper = thread::spawn({
            let stop = stop.clone();
            move || {
                thread::sleep(Duration::from_millis(20));
                stop.store(true, Ordering::Relaxed);
            }
        });
        assert!(queue.next(&stop).unwrap().is_none());
        wait.store(false, Ordering::Relaxed);
        stopper.join().unwrap();
    }
}
