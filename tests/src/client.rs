//! The NBD client of the tests: `blkrepl_nbd::client` with owned requests and one error type, in words
//! that a test can show. It never retries, reconnects or repeats a request.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use blkrepl_nbd::client as nbd;
use blkrepl_nbd::{ClientOptions, NbdClient, NbdError, NbdUri, RefusalKind};

/// Longest wait for one blocking call.
const CALL_LIMIT: Duration = Duration::from_secs(40);

/// Why a connection could not be made or is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkError {
    /// The server is there and refuses the export by policy (it is not primary); its own words.
    NotPrimary(String),
    /// The server is there and refuses for another reason.
    Refused(String),
    /// No connection, or it is over: requests without an answer have an unknown outcome.
    Down(String),
}

impl std::fmt::Display for LinkError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NotPrimary(text) => write!(f, "refused, not primary: {text}"),
            Self::Refused(text) => write!(f, "refused: {text}"),
            Self::Down(text) => write!(f, "down: {text}"),
        }
    }
}

impl std::error::Error for LinkError {}

/// A request that owns its data.
#[derive(Clone, Debug)]
pub enum Request {
    /// Read `len` bytes at `offset`.
    Read {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u32,
    },
    /// Write `data` at `offset`.
    Write {
        /// First byte.
        offset: u64,
        /// The bytes.
        data: Vec<u8>,
        /// Stable before the answer.
        fua: bool,
    },
    /// Make everything acknowledged on any connection stable.
    Flush,
    /// Give up `len` bytes at `offset`.
    Trim {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u32,
    },
    /// Write `len` zeroes at `offset`.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u32,
    },
}

/// An answer: the data of a read (empty for all else), or the error that the server gave.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Which request.
    pub handle: u64,
    /// What became of it.
    pub result: Result<Vec<u8>, String>,
}

/// A connection past its negotiation.
pub struct Link {
    client: NbdClient,
}

impl Link {
    /// Connects to an address such as `nbd+unix:///vol0?socket=PATH`.
    ///
    /// # Errors
    /// [`LinkError`]; a bad address counts as refused.
    pub fn connect(uri: &str, limit: Duration) -> Result<Self, LinkError> {
        let uri: NbdUri = uri.parse().map_err(|e| LinkError::Refused(format!("{e}")))?;
        let options = ClientOptions { connect_timeout: limit, io_timeout: CALL_LIMIT };
        match NbdClient::connect(&uri, options) {
            Ok(client) => {
                // Given up, it is reset: what the network did not carry yet must not arrive after a replay.
                let _ = rustix::net::sockopt::set_socket_linger(&client, Some(Duration::ZERO));
                Ok(Self { client })
            }
            Err(NbdError::Refused { kind: RefusalKind::Policy, message }) => {
                Err(LinkError::NotPrimary(message))
            }
            Err(error @ NbdError::Refused { .. }) => Err(LinkError::Refused(error.to_string())),
            Err(error) => Err(LinkError::Down(error.to_string())),
        }
    }

    /// Size of the export in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.client.size()
    }

    /// Sends a request without waiting for its answer; its handle.
    ///
    /// # Errors
    /// [`LinkError::Down`].
    pub fn submit(&mut self, request: &Request) -> Result<u64, LinkError> {
        self.client.submit(wire(request)).map(|handle| handle.0).map_err(down)
    }

    /// Waits for the next answer, in whatever order they come.
    ///
    /// # Errors
    /// [`LinkError::Down`] if the connection ends, or nothing comes within `limit`.
    pub fn next(&mut self, limit: Duration) -> Result<Answer, LinkError> {
        let silent = || LinkError::Down(format!("no answer within {limit:?}"));
        self.poll(limit)?.ok_or_else(silent)
    }

    /// Waits for the next answer; none if nothing comes within `limit` on a connection that is alive.
    ///
    /// # Errors
    /// [`LinkError::Down`] if the connection ends.
    pub fn poll(&mut self, limit: Duration) -> Result<Option<Answer>, LinkError> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if let Some(done) = self.client.poll(left).map_err(down)? {
                let result = done.result.map_err(|errno| errno.to_string());
                return Ok(Some(Answer { handle: done.handle.0, result }));
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
        }
    }

    /// Sends a request and waits for its answer.
    ///
    /// # Errors
    /// The server's error, or the end of the connection.
    pub fn call(&mut self, request: &Request) -> Result<Vec<u8>> {
        Ok(self.client.call(wire(request))?)
    }

    /// Reads.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn read(&mut self, offset: u64, len: u32) -> Result<Vec<u8>> {
        let data = self.call(&Request::Read { offset, len })?;
        if data.len() != len as usize {
            bail!("a read of {len} bytes at {offset} returned {}", data.len());
        }
        Ok(data)
    }

    /// Writes.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        Ok(self.client.write(offset, data)?)
    }

    /// Flushes.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn flush(&mut self) -> Result<()> {
        Ok(self.client.flush()?)
    }
}

fn down(error: NbdError) -> LinkError {
    LinkError::Down(error.to_string())
}

fn wire(request: &Request) -> nbd::Request<'_> {
    match request {
        Request::Read { offset, len } => nbd::Request::Read { offset: *offset, len: *len },
        Request::Write { offset, data, fua } => nbd::Request::Write { offset: *offset, data, fua: *fua },
        Request::Flush => nbd::Request::Flush,
        Request::Trim { offset, len } => nbd::Request::Trim { offset: *offset, len: *len, fua: false },
        Request::WriteZeroes { offset, len } => {
            nbd::Request::WriteZeroes { offset: *offset, len: *len, fua: false, no_hole: false }
        }
    }
}
