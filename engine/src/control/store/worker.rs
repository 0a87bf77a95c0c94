//! The thread that owns the store. Disk latency stays off the runtime that sends heartbeats, and one queue
//! keeps votes, log writes and reads in the order in which Raft asked for them.

use std::io;
use std::thread;

use tokio::sync::{mpsc, oneshot, watch};

use super::db::Db;

/// Jobs queued at once; beyond, whoever asks waits.
const JOBS_MAX: usize = 64;

type Job = Box<dyn FnOnce(&Db) + Send>;

/// Asks the store's thread. The thread ends, and the store is closed, when the last handle is dropped.
#[derive(Clone)]
pub(in super::super) struct StoreHandle {
    jobs: mpsc::Sender<Job>,
}

/// Turns true when the store is closed.
pub(in super::super) type Closed = watch::Receiver<bool>;

impl StoreHandle {
    /// Starts the thread.
    pub(in super::super) fn start(db: Db) -> io::Result<(Self, Closed)> {
        let (jobs, mut queue) = mpsc::channel::<Job>(JOBS_MAX);
        let (closed, on_close) = watch::channel(false);
        thread::Builder::new().name("blkrepl-store".into()).spawn(move || {
            while let Some(job) = queue.blocking_recv() {
                job(&db);
            }
            drop(db);
            closed.send_replace(true);
        })?;
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
