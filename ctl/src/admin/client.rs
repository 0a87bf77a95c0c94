//! Asks a node over its admin socket. Blocking, for the commands, `dev` and `demo`.
//!
//! Never retries: a request that changes something may have taken effect even if no answer came, and
//! the error says so.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;
use thiserror::Error;

use super::{Reply, Request, StatusView};

/// How long an answer may take. Longer than the longest wait of a node on behalf of a request.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(90);
/// How long a status may take when a program polls for it.
pub const STATUS_TIMEOUT: Duration = Duration::from_secs(5);

/// Why there is no result.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AskError {
    /// Nobody listens.
    #[error(
        "cannot reach a node at admin socket {socket}: {source}; is it running? name another with --admin \
        SOCKET"
    )]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The connection broke or timed out.
    #[error(
        "no answer from the node at {socket}: {source}; if the request changes something, it may still \
        take effect: see `blkrepl status`"
    )]
    Broken {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The answer is not one of ours.
    #[error("the node at {socket} answered something that this version does not understand: {reason}")]
    Malformed {
        /// The socket.
        socket: PathBuf,
        /// What.
        reason: String,
    },
    /// The node refused or failed; its words.
    #[error("{0}")]
    Refused(String),
}

/// One connection to an admin socket.
pub struct AdminClient {
    socket: PathBuf,
    stream: BufReader<UnixStream>,
}

impl AdminClient {
    /// Connects. An answer that takes longer than `timeout` is an error.
    ///
    /// # Errors
    /// [`AskError::Connect`].
    pub fn connect(socket: &Path, timeout: Duration) -> Result<Self, AskError> {
        let fail = |source| AskError::Connect { socket: socket.to_path_buf(), source };
        let stream = UnixStream::connect(socket).map_err(fail)?;
        stream.set_read_timeout(Some(timeout)).map_err(fail)?;
        stream.set_write_timeout(Some(timeout)).map_err(fail)?;
        Ok(Self { socket: socket.to_path_buf(), stream: BufReader::new(stream) })
    }

    /// Sends a request.
    ///
    /// # Errors
    /// [`AskError::Broken`].
    pub fn send(&mut self, request: &Request) -> Result<(), AskError> {
        let mut line = serde_json::to_string(request)
            .map_err(|e| AskError::Malformed { socket: self.socket.clone(), reason: e.to_string() })?;
        line.push('\n');
        self.stream.get_mut().write_all(line.as_bytes()).map_err(|source| self.broken(source))
    }

    /// Waits without limit for lines from now on (for `events --follow`).
    ///
    /// # Errors
    /// [`AskError::Broken`].
    pub fn wait_forever(&mut self) -> Result<(), AskError> {
        self.stream.get_ref().set_read_timeout(None).map_err(|source| self.broken(source))
    }

    /// The next reply; `None` when the node closed the connection.
    ///
    /// # Errors
    /// [`AskError`].
    pub fn receive<T: DeserializeOwned>(&mut self) -> Result<Option<T>, AskError> {
        let mut line = String::new();
        let n = self.stream.read_line(&mut line).map_err(|source| self.broken(source))?;
        if n == 0 {
            return Ok(None);
        }
        let malformed = |reason: String| AskError::Malformed { socket: self.socket.clone(), reason };
        match serde_json::from_str::<Reply>(&line).map_err(|e| malformed(e.to_string()))? {
            Reply::Ok(value) => serde_json::from_value(value).map(Some).map_err(|e| malformed(e.to_string())),
            Reply::Error(reason) => Err(AskError::Refused(reason)),
        }
    }

    fn broken(&self, source: std::io::Error) -> AskError {
        AskError::Broken { socket: self.socket.clone(), source }
    }
}

/// One request, one answer.
///
/// # Errors
/// [`AskError`].
pub fn ask<T: DeserializeOwned>(socket: &Path, request: &Request, timeout: Duration) -> Result<T, AskError> {
    let mut client = AdminClient::connect(socket, timeout)?;
    client.send(request)?;
    client.receive()?.ok_or_else(|| AskError::Broken {
        socket: socket.to_path_buf(),
        source: std::io::ErrorKind::UnexpectedEof.into(),
    })
}

/// The status that a node gives.
///
/// # Errors
/// [`AskError`].
pub fn status(socket: &Path) -> Result<StatusView, AskError> {
    ask(socket, &Request::Status {}, STATUS_TIMEOUT)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// A client whose node has said `bytes` and left.
    fn answered(bytes: &[u8]) -> AdminClient {
        let (ours, mut node) = UnixStream::pair().unwrap();
        node.write_all(bytes).unwrap();
        AdminClient { socket: "/a.sock".into(), stream: BufReader::new(ours) }
    }

    proptest! {
        #[test]
        fn any_lines_are_answers_or_errors_that_name_the_socket(
            lines in vec("\\{\"(ok|error)\":(\"[a-z]{0,9}\"|[0-9]{1,3}|null)\\}|[^\n]{0,20}", 0..4),
        ) {
            let mut client = answered(format!("{}\n", lines.join("\n")).as_bytes());
            // Without any line there is an empty one.
            for line in lines.iter().map(String::as_str).chain(lines.is_empty().then_some("")) {
                let text = |prefix: &str| line.strip_prefix(prefix)?.strip_suffix("\"}");
                match client.receive::<String>() {
                    Ok(answer) => prop_assert_eq!(answer.as_deref(), text("{\"ok\":\"")),
                    Err(AskError::Refused(reason)) => prop_assert_eq!(Some(&*reason), text("{\"error\":\"")),
                    Err(error) => prop_assert!(error.to_string().contains("/a.sock"), "{}", error),
                }
            }
            prop_assert_eq!(client.receive::<String>().unwrap(), None);
        }

        #[test]
        fn other_bytes_are_errors_and_never_an_answer(bytes in vec(any::<u8>(), 1..200)) {
            let error = answered(&bytes).receive::<String>().unwrap_err();
            prop_assert!(matches!(error, AskError::Malformed { .. } | AskError::Broken { .. }), "{}", error);
        }
    }
}
