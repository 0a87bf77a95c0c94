//! One process in simulated time: its tasks, its timers, its clock, its chance.
//!
//! A task runs only in [`Process::step`], which the cluster calls; of all woken tasks the next is drawn. A timer
//! is over only when the cluster fires it, one at a time. A dead process runs nothing, whatever is still held
//! of it. Panics of tasks are kept as text: they are findings.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use blkrepl_engine::control::{Host, HostTask, enter};
use blkrepl_engine::types::Nanos;

use crate::clock::{Clock, MS, Time};
use crate::rng::Rng;

/// True time, shared by all processes and the network.
#[derive(Clone, Debug, Default)]
pub(crate) struct Now(Arc<AtomicU64>);

impl Now {
    pub(crate) fn get(&self) -> Time {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn set(&self, now: Time) {
        assert!(now >= self.get(), "time runs backwards");
        self.0.store(now, Ordering::Relaxed);
    }
}

/// Locks one of ours. A panic of a task never happens under one of these locks.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Task {
    /// Taken out while it is polled.
    task: Option<HostTask>,
    waker: Waker,
    aborted: bool,
}

struct Timer {
    at: Time,
    waker: Option<Waker>,
}

struct State {
    next: u64,
    tasks: BTreeMap<u64, Task>,
    woken: BTreeSet<u64>,
    /// Timers that have not fired.
    timers: BTreeMap<u64, Timer>,
    due: BTreeSet<(Time, u64)>,
    rng: Rng,
    dead: bool,
    polls: u64,
    panics: Vec<String>,
}

/// A process.
pub(crate) struct Process {
    this: Weak<Self>,
    now: Now,
    clock: Clock,
    state: Mutex<State>,
}

struct WakeTask {
    process: Weak<Process>,
    task: u64,
}

impl Wake for WakeTask {
    fn wake(self: Arc<Self>) {
        if let Some(process) = self.process.upgrade() {
            let mut state = lock(&process.state);
            if state.tasks.contains_key(&self.task) {
                state.woken.insert(self.task);
            }
        }
    }
}

impl Process {
    pub(crate) fn new(now: Now, clock: Clock, rng: Rng) -> Arc<Self> {
        let state = State {
            next: 1,
            tasks: BTreeMap::new(),
            woken: BTreeSet::new(),
            timers: BTreeMap::new(),
            due: BTreeSet::new(),
            rng,
            dead: false,
            polls: 0,
            panics: Vec::new(),
        };
        Arc::new_cyclic(|this| Self { this: Weak::clone(this), now, clock, state: Mutex::new(state) })
    }

    fn host(&self) -> Arc<dyn Host> {
        self.this.upgrade().expect("a process is always in an Arc")
    }

    /// What its clock shows.
    pub(crate) fn local(&self) -> Nanos {
        self.clock.local(self.now.get())
    }

    /// When in true time its clock shows `local`.
    pub(crate) fn when(&self, local: Nanos) -> Time {
        self.clock.when(local)
    }

    pub(crate) fn draw(&self, from: impl FnOnce(&mut Rng) -> u64) -> u64 {
        from(&mut lock(&self.state).rng)
    }

    /// Runs code of the process that is not a task: handles of its node are used and dropped in here.
    pub(crate) fn enter<R>(&self, step: impl FnOnce() -> R) -> R {
        enter(&self.host(), step)
    }

    /// Starts a task from outside.
    pub(crate) fn start(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.spawn(Box::pin(task));
    }

    /// A wait in true time, without the coarseness of tokio's timers.
    pub(crate) fn pause(&self, duration: Time) -> Pause {
        Pause { host: self.host(), timer: self.timer_at(self.now.get() + duration) }
    }

    fn timer_at(&self, at: Time) -> u64 {
        let mut state = lock(&self.state);
        let id = state.next;
        state.next += 1;
        state.timers.insert(id, Timer { at, waker: None });
        state.due.insert((at, id));
        id
    }

    /// When the next timer fires.
    pub(crate) fn next_timer(&self) -> Option<Time> {
        lock(&self.state).due.first().map(|(at, _)| *at)
    }

    /// Fires the first timer if it is due.
    pub(crate) fn fire(&self) {
        let now = self.now.get();
        let waker = {
            let mut state = lock(&self.state);
            let Some((at, id)) = state.due.first().copied() else { return };
            if at > now {
                return;
            }
            state.due.pop_first();
            state.timers.remove(&id).and_then(|timer| timer.waker)
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    pub(crate) fn is_ready(&self) -> bool {
        !lock(&self.state).woken.is_empty()
    }

    /// Polls one woken task; gives its number.
    pub(crate) fn step(&self) -> Option<u64> {
        let (id, mut task, aborted, waker) = {
            let mut state = lock(&self.state);
            let count = u64::try_from(state.woken.len()).expect("few tasks");
            if count == 0 || state.dead {
                return None;
            }
            let nth = usize::try_from(state.rng.below(count)).expect("few tasks");
            let id = *state.woken.iter().nth(nth).expect("it was counted");
            state.woken.remove(&id);
            state.polls += 1;
            let entry = state.tasks.get_mut(&id).expect("only tasks are woken");
            let waker = entry.waker.clone();
            // An aborted one must not be dropped here: what it owns needs the lock to end.
            (id, entry.task.take(), entry.aborted, waker)
        };
        let mut ended = true;
        if let Some(polled) = task.as_mut().filter(|_| !aborted) {
            let poll = || enter(&self.host(), || polled.as_mut().poll(&mut Context::from_waker(&waker)));
            match catch_unwind(AssertUnwindSafe(poll)) {
                Ok(Poll::Ready(())) => {}
                Ok(Poll::Pending) => ended = false,
                Err(panic) => lock(&self.state).panics.push(text_of(panic.as_ref())),
            }
        }
        if !ended {
            let mut state = lock(&self.state);
            match state.tasks.get_mut(&id) {
                Some(entry) if !entry.aborted => {
                    entry.task = task.take();
                    return Some(id);
                }
                _ => {}
            }
        }
        {
            let mut state = lock(&self.state);
            state.tasks.remove(&id);
            state.woken.remove(&id);
        }
        // What a task owns ends in the process, and may wake and spawn others.
        self.enter(|| drop(task));
        Some(id)
    }

    /// What panicked since the last call.
    pub(crate) fn take_panics(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.state).panics)
    }

    /// The process is gone from one moment to the next.
    pub(crate) fn kill(&self) {
        let tasks = {
            let mut state = lock(&self.state);
            state.dead = true;
            state.woken.clear();
            state.due.clear();
            state.timers.clear();
            std::mem::take(&mut state.tasks)
        };
        drop(tasks);
    }
}

fn text_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without a text").into()
}

impl Host for Process {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.local().0)
    }

    fn spawn(&self, task: HostTask) -> u64 {
        let mut state = lock(&self.state);
        if state.dead {
            drop(state);
            drop(task);
            return 0;
        }
        let id = state.next;
        state.next += 1;
        let waker = Waker::from(Arc::new(WakeTask { process: Weak::clone(&self.this), task: id }));
        state.tasks.insert(id, Task { task: Some(task), waker, aborted: false });
        state.woken.insert(id);
        id
    }

    fn abort(&self, task: u64) {
        let mut state = lock(&self.state);
        if let Some(entry) = state.tasks.get_mut(&task) {
            entry.aborted = true;
            state.woken.insert(task);
        }
    }

    fn is_finished(&self, task: u64) -> bool {
        lock(&self.state).tasks.get(&task).is_none_or(|entry| entry.aborted)
    }

    fn set_timer(&self, at: Duration) -> u64 {
        let at = Nanos(u64::try_from(at.as_nanos()).unwrap_or(u64::MAX / 4));
        // Timers of tokio are a millisecond coarse.
        let coarse = self.draw(|rng| rng.below(MS));
        self.timer_at(self.clock.when(at).max(self.now.get()) + coarse)
    }

    fn poll_timer(&self, timer: u64, waker: &Waker) -> bool {
        let mut state = lock(&self.state);
        match state.timers.get_mut(&timer) {
            Some(timer) => {
                timer.waker = Some(waker.clone());
                false
            }
            None => true,
        }
    }

    fn drop_timer(&self, timer: u64) {
        let mut state = lock(&self.state);
        if let Some(old) = state.timers.remove(&timer) {
            state.due.remove(&(old.at, timer));
        }
    }

    fn random(&self) -> u64 {
        self.draw(Rng::next)
    }
}

/// See [`Process::pause`].
pub(crate) struct Pause {
    host: Arc<dyn Host>,
    timer: u64,
}

impl Future for Pause {
    type Output = ();

    fn poll(self: std::pin::Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.host.poll_timer(self.timer, cx.waker()) { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Drop for Pause {
    fn drop(&mut self) {
        self.host.drop_timer(self.timer);
    }
}
