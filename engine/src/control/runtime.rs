//! Tasks, time and chance of the control plane, openraft's included: tokio's, unless a [`Host`] is entered.
//!
//! A simulator enters its host around every step of a node, so that the very code of production runs in its
//! time, in its order and with its chance. Without a host everything here is a thin cover of tokio. Nothing in
//! `control` spawns, sleeps or reads a monotonic clock but through this file, and nothing here knows of
//! networks or disks, see `environment`.

use std::cell::RefCell;
use std::fmt;
use std::future::Future;
use std::ops::{Add, AddAssign, Sub, SubAssign};
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use openraft::{AsyncRuntime, OptionalSend, TokioRuntime};
use tokio::sync::oneshot;

/// What a host runs.
pub type HostTask = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Where a node runs if not on tokio. All that is asked of it happens within [`enter`].
pub trait Host: Send + Sync {
    /// Time since some moment, by this node's clock. Never goes back.
    fn now(&self) -> Duration;
    /// Takes up a task and names it. It is not polled before this returns.
    fn spawn(&self, task: HostTask) -> u64;
    /// Drops a task soon, without polling it again.
    fn abort(&self, task: u64);
    /// True if a task has ended or was aborted.
    fn is_finished(&self, task: u64) -> bool;
    /// Sets a timer and names it.
    fn set_timer(&self, at: Duration) -> u64;
    /// True if the timer has fired; else `waker` is woken when it does.
    fn poll_timer(&self, timer: u64, waker: &Waker) -> bool;
    /// Forgets a timer.
    fn drop_timer(&self, timer: u64);
    /// A random number for openraft's timeouts.
    fn random(&self) -> u64;
}

thread_local! {
    static HOST: RefCell<Option<Arc<dyn Host>>> = const { RefCell::new(None) };
}

/// Leaves a host when dropped, by a panic as well.
struct Left(Option<Arc<dyn Host>>);

impl Drop for Left {
    fn drop(&mut self) {
        HOST.with(|host| *host.borrow_mut() = self.0.take());
    }
}

/// Runs `step` with everything of the control plane in `host`.
pub fn enter<R>(host: &Arc<dyn Host>, step: impl FnOnce() -> R) -> R {
    let _left = Left(HOST.with(|entered| entered.borrow_mut().replace(Arc::clone(host))));
    step()
}

fn host() -> Option<Arc<dyn Host>> {
    HOST.with(|host| host.borrow().clone())
}

/// True where a task can be spawned.
pub(super) fn is_running() -> bool {
    host().is_some() || tokio::runtime::Handle::try_current().is_ok()
}

/// Starts a task. Dropping the handle leaves it running.
pub(super) fn spawn<T: Send + 'static>(task: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    let Some(host) = host() else { return JoinHandle::Tokio(tokio::spawn(task)) };
    let (done, result) = oneshot::channel();
    let id = host.spawn(Box::pin(async move {
        // Nobody may be left who wants it.
        let _ = done.send(task.await);
    }));
    JoinHandle::Hosted { task: Hosted { host, id }, result }
}

/// Waits.
pub(super) fn sleep(duration: Duration) -> Sleep {
    match host() {
        Some(host) => Sleep::hosted(host, duration),
        None => Sleep::Tokio(Box::pin(tokio::time::sleep(duration))),
    }
}

/// Waits until a point in time.
pub(super) fn sleep_until(deadline: Instant) -> Sleep {
    match host() {
        Some(host) => Sleep::hosted(host, deadline - Instant::now()),
        None => Sleep::Tokio(Box::pin(tokio::time::sleep_until(deadline.0))),
    }
}

/// Gives a future a limited time.
pub(super) fn timeout<F: Future>(limit: Duration, future: F) -> Timeout<F> {
    Timeout { future: Box::pin(future), limit: sleep(limit) }
}

/// Gives a future until a point in time.
pub(super) fn timeout_at<F: Future>(deadline: Instant, future: F) -> Timeout<F> {
    Timeout { future: Box::pin(future), limit: sleep_until(deadline) }
}

/// A point in monotonic time, of the host or of tokio; never one of both in one comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Instant(tokio::time::Instant);

impl Instant {
    /// Now.
    pub(super) fn now() -> Self {
        // A host counts from a moment of its own; any fixed one of ours stands for it.
        static ORIGIN: OnceLock<tokio::time::Instant> = OnceLock::new();
        match host() {
            Some(host) => Self(*ORIGIN.get_or_init(tokio::time::Instant::now) + host.now()),
            None => Self(tokio::time::Instant::now()),
        }
    }

    /// Time since then.
    pub(super) fn elapsed(&self) -> Duration {
        Self::now() - *self
    }
}

impl openraft::Instant for Instant {
    fn now() -> Self {
        Self::now()
    }
}

impl Add<Duration> for Instant {
    type Output = Self;

    fn add(self, other: Duration) -> Self {
        Self(self.0 + other)
    }
}

impl AddAssign<Duration> for Instant {
    fn add_assign(&mut self, other: Duration) {
        self.0 += other;
    }
}

impl Sub<Duration> for Instant {
    type Output = Self;

    fn sub(self, other: Duration) -> Self {
        Self(self.0 - other)
    }
}

impl SubAssign<Duration> for Instant {
    fn sub_assign(&mut self, other: Duration) {
        self.0 -= other;
    }
}

impl Sub for Instant {
    type Output = Duration;

    /// Zero if `other` is later.
    fn sub(self, other: Self) -> Duration {
        self.0.saturating_duration_since(other.0)
    }
}

/// A wait.
pub(super) enum Sleep {
    /// On tokio.
    Tokio(Pin<Box<tokio::time::Sleep>>),
    /// In a host.
    Hosted(Arc<dyn Host>, u64),
}

impl Sleep {
    fn hosted(host: Arc<dyn Host>, duration: Duration) -> Self {
        let timer = host.set_timer(host.now().saturating_add(duration));
        Self::Hosted(host, timer)
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        match self.get_mut() {
            Self::Tokio(sleep) => sleep.as_mut().poll(cx),
            Self::Hosted(host, timer) if host.poll_timer(*timer, cx.waker()) => Poll::Ready(()),
            Self::Hosted(..) => Poll::Pending,
        }
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Self::Hosted(host, timer) = self {
            host.drop_timer(*timer);
        }
    }
}

/// A future with a limit. What is ready at its limit counts as in time.
pub(super) struct Timeout<F> {
    future: Pin<Box<F>>,
    limit: Sleep,
}

/// The time was over.
#[derive(Clone, Copy, Debug)]
pub(super) struct Elapsed;

impl fmt::Display for Elapsed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no answer in time")
    }
}

impl<F: Future> Future for Timeout<F> {
    type Output = Result<F::Output, Elapsed>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let Poll::Ready(output) = self.future.as_mut().poll(cx) {
            return Poll::Ready(Ok(output));
        }
        Pin::new(&mut self.limit).poll(cx).map(|()| Err(Elapsed))
    }
}

/// How late a round may be without delaying the later ones.
const LATE: Duration = Duration::from_millis(5);

/// Something to be done again and again; late rounds delay all later ones.
pub(super) struct Ticker {
    next: Instant,
    period: Duration,
}

impl Ticker {
    /// The first round is due at once.
    pub(super) fn new(period: Duration) -> Self {
        Self { next: Instant::now(), period }
    }

    /// Waits for the next round.
    pub(super) async fn tick(&mut self) {
        sleep_until(self.next).await;
        let now = Instant::now();
        let late = now - self.next > LATE;
        self.next = if late { now } else { self.next } + self.period;
    }
}

/// A task in a host.
pub(super) struct Hosted {
    host: Arc<dyn Host>,
    id: u64,
}

/// A started task.
pub(super) enum JoinHandle<T> {
    /// On tokio.
    Tokio(tokio::task::JoinHandle<T>),
    /// In a host.
    Hosted {
        /// The task.
        task: Hosted,
        /// What it gives.
        result: oneshot::Receiver<T>,
    },
}

/// Why a task gave nothing.
#[derive(Debug)]
pub(super) enum JoinError {
    /// On tokio: it was aborted, or panicked.
    Tokio(tokio::task::JoinError),
    /// In a host: it was aborted. A panic is the host's to report.
    Gone,
}

impl fmt::Display for JoinError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tokio(e) => e.fmt(f),
            Self::Gone => f.write_str("the task was aborted"),
        }
    }
}

impl<T> Future for JoinHandle<T> {
    type Output = Result<T, JoinError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.get_mut() {
            Self::Tokio(handle) => Pin::new(handle).poll(cx).map_err(JoinError::Tokio),
            Self::Hosted { result, .. } => Pin::new(result).poll(cx).map_err(|_| JoinError::Gone),
        }
    }
}

/// Ends a task from elsewhere.
pub(super) enum AbortHandle {
    /// On tokio.
    Tokio(tokio::task::AbortHandle),
    /// In a host.
    Hosted(Hosted),
}

impl AbortHandle {
    /// Ends the task soon.
    pub(super) fn abort(&self) {
        match self {
            Self::Tokio(handle) => handle.abort(),
            Self::Hosted(task) => task.host.abort(task.id),
        }
    }

    /// True if the task has ended.
    pub(super) fn is_finished(&self) -> bool {
        match self {
            Self::Tokio(handle) => handle.is_finished(),
            Self::Hosted(task) => task.host.is_finished(task.id),
        }
    }
}

impl<T> JoinHandle<T> {
    /// A handle that only ends the task.
    pub(super) fn abort_handle(&self) -> AbortHandle {
        match self {
            Self::Tokio(handle) => AbortHandle::Tokio(handle.abort_handle()),
            Self::Hosted { task, .. } => {
                AbortHandle::Hosted(Hosted { host: Arc::clone(&task.host), id: task.id })
            }
        }
    }
}

/// Tasks that end together, at the latest when this is dropped.
#[derive(Default)]
pub(super) struct TaskSet {
    tasks: Vec<(AbortHandle, JoinHandle<()>)>,
}

impl TaskSet {
    /// Starts a task.
    pub(super) fn spawn(&mut self, task: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        let handle = spawn(task);
        let (abort, other) = (handle.abort_handle(), handle.abort_handle());
        self.tasks.push((abort, handle));
        other
    }

    /// Forgets the tasks that have ended.
    pub(super) fn reap(&mut self) {
        self.tasks.retain(|(task, _)| !task.is_finished());
    }

    /// Ends all tasks soon.
    pub(super) fn abort_all(&self) {
        for (task, _) in &self.tasks {
            task.abort();
        }
    }

    /// Ends all tasks and waits until they are gone.
    pub(super) async fn shutdown(mut self) {
        self.abort_all();
        for (_, task) in std::mem::take(&mut self.tasks) {
            // Aborted, which is what is wanted; or it panicked, which was told then.
            let _ = task.await;
        }
    }
}

impl Drop for TaskSet {
    fn drop(&mut self) {
        self.abort_all();
    }
}

/// Chance for openraft's timeouts.
pub(super) enum Chance {
    /// The system's.
    System(rand::rngs::ThreadRng),
    /// The host's.
    Hosted(Arc<dyn Host>),
}

impl rand::RngCore for Chance {
    fn next_u32(&mut self) -> u32 {
        self.next_u64() as u32
    }

    fn next_u64(&mut self) -> u64 {
        match self {
            Self::System(rng) => rng.next_u64(),
            Self::Hosted(host) => host.random(),
        }
    }

    fn fill_bytes(&mut self, out: &mut [u8]) {
        for chunk in out.chunks_mut(8) {
            let bytes = self.next_u64().to_le_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
    }

    fn try_fill_bytes(&mut self, out: &mut [u8]) -> Result<(), rand::Error> {
        self.fill_bytes(out);
        Ok(())
    }
}

/// What openraft runs on: the functions above.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Runtime;

impl AsyncRuntime for Runtime {
    type JoinError = JoinError;
    type JoinHandle<T: OptionalSend + 'static> = JoinHandle<T>;
    type Sleep = Sleep;
    type Instant = Instant;
    type TimeoutError = Elapsed;
    type Timeout<R, T: Future<Output = R> + OptionalSend> = Timeout<T>;
    type ThreadLocalRng = Chance;
    type OneshotSender<T: OptionalSend> = <TokioRuntime as AsyncRuntime>::OneshotSender<T>;
    type OneshotReceiver<T: OptionalSend> = oneshot::Receiver<T>;
    type OneshotReceiverError = oneshot::error::RecvError;

    fn spawn<T>(future: T) -> JoinHandle<T::Output>
    where
        T: Future + OptionalSend + 'static,
        T::Output: OptionalSend + 'static,
    {
        spawn(future)
    }

    fn sleep(duration: Duration) -> Sleep {
        sleep(duration)
    }

    fn sleep_until(deadline: Instant) -> Sleep {
        sleep_until(deadline)
    }

    fn timeout<R, F: Future<Output = R> + OptionalSend>(duration: Duration, future: F) -> Timeout<F> {
        timeout(duration, future)
    }

    fn timeout_at<R, F: Future<Output = R> + OptionalSend>(deadline: Instant, future: F) -> Timeout<F> {
        timeout_at(deadline, future)
    }

    fn is_panic(error: &JoinError) -> bool {
        matches!(error, JoinError::Tokio(e) if e.is_panic())
    }

    fn thread_rng() -> Chance {
        host().map_or_else(|| Chance::System(rand::thread_rng()), Chance::Hosted)
    }

    fn oneshot<T: OptionalSend>() -> (Self::OneshotSender<T>, Self::OneshotReceiver<T>) {
        TokioRuntime::oneshot()
    }
}
