//! Serves the admin socket: reads request lines, hands them to an [`AdminApi`], writes reply lines.
//!
//! Bounded: a request line longer than [`REQUEST_BYTES_MAX`] is refused, and of [`CONNECTIONS_MAX`]
//! connections the oldest that waits for no answer makes room for a new one, so that tools which leave
//! connections open never lock an operator out. The socket is readable and writable by its owner only.

use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use thiserror::Error;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::{AbortHandle, JoinSet};

use super::{REQUEST_BYTES_MAX, Reply, Request};
use crate::events::EventLog;

/// Connections served at once.
pub const CONNECTIONS_MAX: usize = 128;

/// A boxed future of a reply.
pub type ReplyFuture = Pin<Box<dyn Future<Output = Reply> + Send>>;

/// Carries out requests other than events.
pub trait AdminApi: Send + Sync + 'static {
    /// Carries out one request.
    fn handle(&self, request: Request) -> ReplyFuture;
}

/// Why the socket cannot be served.
#[derive(Debug, Error)]
#[error(
    "cannot serve the admin socket {path}: {source}; remove what stands there or set listen.admin in \
    node.toml"
)]
pub struct ListenError {
    path: PathBuf,
    source: std::io::Error,
}

/// Binds the socket. The caller holds the node's directory lock, so a socket file that is left over
/// belongs to nobody and is replaced.
///
/// # Errors
/// [`ListenError`].
pub fn listen(path: &Path) -> Result<UnixListener, ListenError> {
    let fail = |source| ListenError { path: path.to_path_buf(), source };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(fail)?;
    }
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(fail(std::io::Error::new(
            std::io::ErrorKind::AddrInUse,
            "another process answers on it",
        )));
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(fail(e)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(fail)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(fail)?;
    Ok(listener)
}

/// Serves until the task is dropped.
pub async fn serve(listener: UnixListener, api: Arc<dyn AdminApi>, events: Arc<EventLog>) {
    let mut connections = JoinSet::new();
    let mut by_age: Vec<(AbortHandle, Arc<AtomicBool>)> = Vec::new();
    loop {
        let accepted = listener.accept().await;
        while connections.try_join_next().is_some() {}
        by_age.retain(|(connection, _)| !connection.is_finished());
        if by_age.len() >= CONNECTIONS_MAX {
            match by_age.iter().position(|(_, busy)| !busy.load(Ordering::Relaxed)) {
                Some(oldest) => by_age.remove(oldest).0.abort(),
                // Each has a command under way, which is not broken off.
                None => drop(connections.join_next().await),
            }
        }
        match accepted {
            Ok((stream, _)) => {
                let (api, events) = (Arc::clone(&api), Arc::clone(&events));
                let busy = Arc::new(AtomicBool::new(false));
                let waits = Arc::clone(&busy);
                let task = connections.spawn(async move {
                    if let Err(error) = connection(stream, api, events, &waits).await {
                        tracing::debug!("admin connection ended: {error}");
                    }
                });
                by_age.push((task, busy));
            }
            Err(error) => {
                tracing::warn!("cannot accept on the admin socket: {error}");
                tokio::time::sleep(std::time::Duration::from_millis(200)).await;
            }
        }
    }
}

async fn connection(
    stream: UnixStream,
    api: Arc<dyn AdminApi>,
    events: Arc<EventLog>,
    busy: &AtomicBool,
) -> std::io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read);
    while let Some(line) = read_line(&mut read).await? {
        let reply = match serde_json::from_slice::<Request>(&line) {
            Ok(Request::Events { after, follow: true }) => {
                return follow(after, &events, &mut read, &mut write).await;
            }
            Ok(Request::Events { after, follow: false }) => to_reply(&all_after(after, &events)),
            Ok(request) => {
                busy.store(true, Ordering::Relaxed);
                let reply = api.handle(request).await;
                busy.store(false, Ordering::Relaxed);
                reply
            }
            Err(error) => Reply::Error(format!(
                "this node does not understand the request ({error}); use a blkrepl of its version ({})",
                env!("CARGO_PKG_VERSION")
            )),
        };
        write_line(&mut write, &reply).await?;
    }
    Ok(())
}

async fn read_line(read: &mut (impl AsyncBufRead + Unpin)) -> std::io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let n = read.take(REQUEST_BYTES_MAX as u64).read_until(b'\n', &mut line).await?;
    match n {
        0 => Ok(None),
        REQUEST_BYTES_MAX if line.last() != Some(&b'\n') => {
            Err(std::io::Error::new(std::io::ErrorKind::InvalidData, "request line too long"))
        }
        _ => Ok(Some(line)),
    }
}

async fn write_line(write: &mut (impl AsyncWriteExt + Unpin), reply: &Reply) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    write.write_all(&line).await
}

/// Turns a value into a reply.
pub fn to_reply(value: &impl serde::Serialize) -> Reply {
    serde_json::to_value(value).map_or_else(
        |error| Reply::Error(format!("the answer cannot be written as JSON: {error}")),
        Reply::Ok,
    )
}

fn all_after(mut after: u64, events: &EventLog) -> Vec<crate::events::EventRecord> {
    let mut all = Vec::new();
    loop {
        let batch = events.after(after);
        let Some(last) = batch.last() else { return all };
        after = last.seq;
        all.extend(batch);
        if all.len() >= crate::events::EVENTS_MAX {
            return all;
        }
    }
}

async fn follow(
    mut after: u64,
    events: &EventLog,
    read: &mut (impl AsyncBufRead + Unpin),
    write: &mut (impl AsyncWriteExt + Unpin),
) -> std::io::Result<()> {
    let mut news = events.watch();
    loop {
        news.mark_unchanged();
        for event in events.after(after) {
            after = event.seq;
            write_line(write, &to_reply(&event)).await?;
        }
        if *news.borrow() > after {
            continue;
        }
        tokio::select! {
            changed = news.changed() => if changed.is_err() { return Ok(()) },
            // A client that leaves (or talks) ends the stream.
            _ = read.fill_buf() => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::admin::client::{AdminClient, AskError, ask};
    use crate::events::{EventRecord, Happening};

    struct Fake;

    impl AdminApi for Fake {
        fn handle(&self, request: Request) -> ReplyFuture {
            Box::pin(async move {
                match request {
                    Request::Demote { volume } => Reply::Error(format!("no volume named '{volume}'")),
                    other => to_reply(&format!("{other:?}")),
                }
            })
        }
    }

    fn start(dir: &Path) -> (PathBuf, Arc<EventLog>) {
        let path = dir.join("admin.sock");
        let events = Arc::new(EventLog::new("n1"));
        let (log, socket) = (Arc::clone(&events), path.clone());
        let (ready, wait) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let listener = listen(&socket).unwrap();
                ready.send(()).unwrap();
                serve(listener, Arc::new(Fake), log).await;
            });
        });
        wait.recv().unwrap();
        (path, events)
    }

    #[test]
    fn answers_refusals_and_followed_events_arrive() {
        let dir = tempfile::tempdir().unwrap();
        let (socket, events) = start(dir.path());
        let second = Duration::from_secs(5);
        let text: String = ask(&socket, &Request::Status {}, second).unwrap();
        assert_eq!(text, "Status");
        let error = ask::<String>(&socket, &Request::Demote { volume: "v".into() }, second).unwrap_err();
        assert!(matches!(error, AskError::Refused(ref reason) if reason == "no volume named 'v'"), "{error}");

        events.record(None, Happening::new("session", "one"));
        let all: Vec<EventRecord> =
            ask(&socket, &Request::Events { after: 0, follow: false }, second).unwrap();
        assert_eq!(all.len(), 1);
        let mut client = AdminClient::connect(&socket, second).unwrap();
        client.send(&Request::Events { after: 0, follow: true }).unwrap();
        assert_eq!(client.receive::<EventRecord>().unwrap().unwrap().text, "one");
        events.record(Some("vol0"), Happening::new("session", "two"));
        assert_eq!(client.receive::<EventRecord>().unwrap().unwrap().text, "two");
        assert!(listen(&socket).unwrap_err().to_string().contains("another process answers"));
    }

    #[test]
    fn connections_left_open_do_not_lock_an_operator_out() {
        let dir = tempfile::tempdir().unwrap();
        let (socket, _) = start(dir.path());
        let open: Vec<_> = (0..2 * CONNECTIONS_MAX)
            .map(|_| std::os::unix::net::UnixStream::connect(&socket).unwrap())
            .collect();
        let text: String = ask(&socket, &Request::Status {}, Duration::from_secs(5)).unwrap();
        assert_eq!(text, "Status");
        drop(open);
    }

    #[test]
    fn a_request_of_another_version_is_refused_and_the_connection_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let (socket, _) = start(dir.path());
        use std::io::{BufRead, Write};
        let mut stream = std::os::unix::net::UnixStream::connect(&socket).unwrap();
        stream.write_all(b"{\"op\":\"fly\"}\n{\"op\":\"status\"}\n").unwrap();
        let mut lines = std::io::BufReader::new(stream).lines();
        assert!(lines.next().unwrap().unwrap().contains("does not understand"));
        assert_eq!(lines.next().unwrap().unwrap(), r#"{"ok":"Status"}"#);
    }

    /// What a connection answers to `sent`, line by line.
    fn answers(sent: Vec<u8>) -> std::io::Result<Vec<Reply>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let (mut ours, theirs) = UnixStream::pair()?;
            let served = tokio::spawn(async move {
                let events = Arc::new(EventLog::new("n1"));
                connection(theirs, Arc::new(Fake), events, &AtomicBool::new(false)).await
            });
            ours.write_all(&sent).await?;
            ours.shutdown().await?;
            let mut text = String::new();
            ours.read_to_string(&mut text).await?;
            served.await??;
            Ok(text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?)
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn each_line_has_one_answer_in_its_place(
            lines in vec(prop_oneof![
                Just((b"{\"op\":\"status\"}".to_vec(), true)),
                vec(any::<u8>().prop_filter("ends the line", |&b| b != b'\n'), 0..50)
                    .prop_map(|bytes| (bytes, false)),
            ], 0..8),
            last_ends in any::<bool>(),
        ) {
            let mut sent: Vec<u8> = lines.iter().flat_map(|(line, _)| [&line[..], b"\n"].concat()).collect();
            if !last_ends && lines.last().is_some_and(|(line, _)| !line.is_empty()) {
                sent.pop();
            }
            let answers = answers(sent).unwrap();
            prop_assert_eq!(answers.len(), lines.len());
            for (answer, (line, good)) in answers.iter().zip(&lines) {
                let understood = !matches!(answer, Reply::Error(text) if text.contains("does not understand"));
                prop_assert_eq!(understood, *good, "{:?}: {:?}", String::from_utf8_lossy(line), answer);
            }
        }

        #[test]
        fn a_line_is_read_up_to_the_longest_that_is_allowed(over in 0usize..4, ends in any::<bool>()) {
            let len = REQUEST_BYTES_MAX - 2 + over;
            let mut sent = vec![b' '; len];
            if ends {
                sent.push(b'\n');
            }
            let answers = answers(sent);
            // The longest line has its newline as last byte; one without is taken for the start of a longer one.
            let allowed = len < REQUEST_BYTES_MAX;
            prop_assert_eq!(answers.is_ok(), allowed, "{} bytes: {:?}", len, answers);
        }
    }
}
