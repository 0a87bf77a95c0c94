//! NBD as a disk speaks it: fixed newstyle negotiation of one nameless export, simple replies. One request
//! of a connection is worked on at a time.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::PoisonError;
use std::time::Duration;

use super::{Inner, SECTOR, Sickness};

const INIT: u64 = 0x4e42_444d_4147_4943;
const OPTION: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const REPLY: u32 = 0x6744_6698;
/// Fixed newstyle, no zeroes.
const HANDSHAKE_FLAGS: u16 = 3;
/// Has flags, flush, FUA, trim, write zeroes, several connections.
const EXPORT_FLAGS: u16 = 0x16d;
const OPT_EXPORT_NAME: u32 = 1;
const OPT_ABORT: u32 = 2;
const OPT_INFO: u32 = 6;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_UNSUPPORTED: u32 = 0x8000_0001;
const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_DISCONNECT: u16 = 2;
const CMD_FLUSH: u16 = 3;
const CMD_TRIM: u16 = 4;
const CMD_ZEROES: u16 = 6;
const FLAG_FUA: u16 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
/// Longest option and longest request.
const OPTION_BYTES_MAX: u32 = 4096;
const REQUEST_BYTES_MAX: u32 = 32 << 20;

/// Serves one connection to its end.
pub(super) fn serve(stream: &UnixStream, inner: &Inner) -> io::Result<()> {
    if !negotiate(stream, inner.len)? {
        return Ok(());
    }
    let mut payload = Vec::new();
    while let Some(request) = Request::read(stream, &mut payload)? {
        let outcome = work(&request, &mut payload, inner)?;
        let mut reply = Vec::with_capacity(16 + payload.len());
        reply.extend(REPLY.to_be_bytes());
        reply.extend(outcome.err().unwrap_or(0).to_be_bytes());
        reply.extend(request.handle.to_be_bytes());
        if request.kind == CMD_READ && outcome.is_ok() {
            reply.extend(&payload);
        }
        let mut stream = stream;
        stream.write_all(&reply)?;
    }
    Ok(())
}

fn negotiate(mut stream: &UnixStream, len: u64) -> io::Result<bool> {
    let mut greeting = Vec::new();
    greeting.extend(INIT.to_be_bytes());
    greeting.extend(OPTION.to_be_bytes());
    greeting.extend(HANDSHAKE_FLAGS.to_be_bytes());
    stream.write_all(&greeting)?;
    let client_flags = u32::from_be_bytes(take(stream)?);
    loop {
        if u64::from_be_bytes(take(stream)?) != OPTION {
            return Err(ErrorKind::InvalidData.into());
        }
        let option = u32::from_be_bytes(take(stream)?);
        let bytes = u32::from_be_bytes(take(stream)?);
        if bytes > OPTION_BYTES_MAX {
            return Err(ErrorKind::InvalidData.into());
        }
        stream.read_exact(&mut vec![0; bytes as usize])?;
        match option {
            OPT_EXPORT_NAME => {
                let mut answer = Vec::new();
                answer.extend(len.to_be_bytes());
                answer.extend(EXPORT_FLAGS.to_be_bytes());
                if client_flags & 2 == 0 {
                    answer.extend([0; 124]);
                }
                stream.write_all(&answer)?;
                return Ok(true);
            }
            OPT_INFO | OPT_GO => {
                let mut export = vec![0, 0];
                export.extend(len.to_be_bytes());
                export.extend(EXPORT_FLAGS.to_be_bytes());
                reply(stream, option, REP_INFO, &export)?;
                let mut sizes = vec![0, 3];
                for size in [SECTOR as u32, 4096, REQUEST_BYTES_MAX] {
                    sizes.extend(size.to_be_bytes());
                }
                reply(stream, option, REP_INFO, &sizes)?;
                reply(stream, option, REP_ACK, &[])?;
                if option == OPT_GO {
                    return Ok(true);
                }
            }
            OPT_ABORT => {
                reply(stream, option, REP_ACK, &[])?;
                return Ok(false);
            }
            _ => reply(stream, option, REP_UNSUPPORTED, &[])?,
        }
    }
}

fn reply(mut stream: &UnixStream, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
    let mut bytes = Vec::new();
    bytes.extend(OPTION_REPLY.to_be_bytes());
    bytes.extend(option.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap_or(0).to_be_bytes());
    bytes.extend(data);
    stream.write_all(&bytes)
}

fn take<const N: usize>(mut stream: &UnixStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

struct Request {
    flags: u16,
    kind: u16,
    handle: u64,
    offset: u64,
    len: u32,
}

impl Request {
    /// The next one, with the data of a write in `payload`; none at the end.
    fn read(mut stream: &UnixStream, payload: &mut Vec<u8>) -> io::Result<Option<Self>> {
        if u32::from_be_bytes(take(stream)?) != REQUEST {
            return Err(ErrorKind::InvalidData.into());
        }
        let request = Self {
            flags: u16::from_be_bytes(take(stream)?),
            kind: u16::from_be_bytes(take(stream)?),
            handle: u64::from_be_bytes(take(stream)?),
            offset: u64::from_be_bytes(take(stream)?),
            len: u32::from_be_bytes(take(stream)?),
        };
        if matches!(request.kind, CMD_READ | CMD_WRITE) {
            if request.len > REQUEST_BYTES_MAX {
                return Err(ErrorKind::InvalidData.into());
            }
            payload.resize(request.len as usize, 0);
            if request.kind == CMD_WRITE {
                stream.read_exact(payload)?;
            }
        }
        Ok((request.kind != CMD_DISCONNECT).then_some(request))
    }

    fn changes(&self) -> bool {
        matches!(self.kind, CMD_WRITE | CMD_TRIM | CMD_ZEROES)
    }

    /// The error that a sick disk answers.
    fn failure(&self, sickness: &Sickness) -> Option<u32> {
        let fua = self.flags & FLAG_FUA != 0;
        let fails = match self.kind {
            CMD_READ => sickness.reads,
            CMD_FLUSH => sickness.flushes,
            _ => sickness.writes || (fua && sickness.flushes),
        };
        if fails {
            return Some(EIO);
        }
        (self.kind != CMD_TRIM && self.changes() && sickness.full).then_some(ENOSPC)
    }
}

/// Does a request; its data is in `payload`, or goes there. The outer error ends the connection.
fn work(request: &Request, payload: &mut [u8], inner: &Inner) -> io::Result<Result<(), u32>> {
    let mut state = inner.lock();
    let delay = state.sickness.delay;
    if !delay.is_zero() {
        drop(state);
        std::thread::sleep(delay);
        state = inner.lock();
    }
    while state.sickness.hung && state.powered && !state.ended {
        let look = Duration::from_millis(50);
        state = inner.changed.wait_timeout(state, look).unwrap_or_else(PoisonError::into_inner).0;
    }
    if !state.powered || state.ended {
        return Err(ErrorKind::ConnectionAborted.into());
    }
    if let Some(errno) = request.failure(&state.sickness) {
        state.counts.failed += 1;
        return Ok(Err(errno));
    }
    let (offset, len) = (request.offset, u64::from(request.len));
    let sector = SECTOR as u64;
    let outside = offset.checked_add(len).is_none_or(|end| end > inner.len);
    if request.kind != CMD_FLUSH && (outside || offset % sector != 0 || len % sector != 0) {
        return Ok(Err(EINVAL));
    }
    let fua = request.flags & FLAG_FUA != 0;
    let done = match request.kind {
        CMD_READ => state.cache.read(offset, payload),
        CMD_WRITE => state.cache.write(offset, payload, fua),
        CMD_TRIM | CMD_ZEROES => zero(&mut state.cache, offset, len, fua),
        CMD_FLUSH => {
            state.counts.flushes += 1;
            state.cache.flush()
        }
        _ => return Ok(Err(EINVAL)),
    };
    Ok(done.map_err(|_| EIO))
}

fn zero(cache: &mut super::Cache, offset: u64, len: u64, fua: bool) -> io::Result<()> {
    const PIECE: u64 = 1 << 20;
    let mut at = 0;
    while at < len {
        let part = PIECE.min(len - at);
        cache.write(offset + at, &vec![0; usize::try_from(part).unwrap_or(0)], fua)?;
        at += part;
    }
    Ok(())
}
