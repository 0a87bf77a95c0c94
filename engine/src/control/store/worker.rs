//! Who owns the store, and the queue to it. One queue keeps votes, log writes and reads in the order in which
//! Raft asked for them. What runs the jobs, and when, is the environment's to say: in production a thread.

use std::future::Future;
use std::io;

use tokio::sync::{mpsc, oneshot, watch};

use super::super::environment::Environment;
use super::db::Db;

/// Jobs queued at once; beyond, whoever asks waits.
const JOBS_MAX: usize = 64;

type Job = Box<dyn FnOnce(&Db) + Send>;

/// The owner of a store: runs its jobs in order, and closes it when the last handle is dropped.
pub struct StoreWorker {
    db: Db,
    queue: mpsc::Receiver<Job>,
    closed: watch::Sender<bool>,
}

impl StoreWorker {
    /// Runs the jobs on this thread, until the store is closed.
    pub fn run_blocking(mut self) {
        while let Some(job) = self.queue.blocking_recv() {
            job(&self.db);
        }
        self.close();
    }

    /// Runs the jobs in this task, until the store is closed; each takes as long as a `pause`.
    pub async fn run<F: Future<Output = ()>>(mut self, mut pause: impl FnMut() -> F) {
        while let Some(job) = self.queue.recv().await {
            pause().await;
            job(&self.db);
        }
        self.close();
    }

    fn close(self) {
        drop(self.db);
        self.closed.send_replace(true);
    }
}

/// Asks the owner of the store.
#[derive(Clone)]
pub(in super::super) struct StoreHandle {
    jobs: mpsc::Sender<Job>,
}

/// Turns true when the store is closed.
pub(in super::super) type Closed = watch::Receiver<bool>;

impl StoreHandle {
    /// Has the store run.
    pub(in super::super) fn start(env: &dyn Environment, db: Db) -> io::Result<(Self, Closed)> {
        let (jobs, queue) = mpsc::channel::<Job>(JOBS_MAX);
        let (closed, on_close) = watch::channel(false);
        env.start_store(StoreWorker { db, queue, closed })?;
        Ok((Self { jobs }, on_close))
    }

    /// Queues a job and returns as soon as it is queued.
    pub(in super::super) async fn post(&self, job: impl FnOnce(&Db) + Send + 'static) -> io::Result<()> {
        self.jobs.send(Box::new(job)).await.map_err(|_| stopped())
    }

    /// Runs a job and returns its result.
    pub(in super::super) async fn run<R, E>(
        &self,
        job: impl FnOnce(&Db) -> Result<R, E> + Send + 'static,
    ) -> io::Result<R>
    where
        R: Send + 'static,
        E: Into<io::Error> + Send + 'static,
    {
        let (done, result) = oneshot::channel();
        // A caller that went away does not want the result; the job is done all the same.
        self.post(move |db| drop(done.send(job(db).map_err(Into::into)))).await?;
        result.await.map_err(|_| stopped())?
    }
}

fn stopped() -> io::Error {
    io::Error::other("the thread of the control store has stopped")
}
