//! The client's side of the fixed newstyle negotiation.
//!
//! Uses `NBD_OPT_GO` only: a server that does not know it is refused, not worked around. Lengths that the
//! server gives are checked before anything is allocated for them.

use std::time::Instant;

use blkrepl_engine::reactor::ClientSession;

use super::ClientOptions;
use super::error::{NbdError, RefusalKind};
use super::sock::Sock;
use crate::export::Place;
use crate::proto::{self, be16, be32, be64};
use crate::uri::Target;

/// Longest option reply that is taken, in bytes.
const REPLY_BYTES_MAX: u32 = 16 << 10;
/// Most replies to one option; a server that gives more is broken.
const REPLIES_MAX: u32 = 65536;
/// Most nodes of a cluster that a server may name.
const PLACES_MAX: u32 = 64;

/// What the server said about an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportFacts {
    /// Bytes.
    pub size: u64,
    /// Transmission flags, `NBD_FLAG_*`.
    pub flags: u16,
    /// Smallest alignment, preferred alignment, longest read or write; bytes. `None` if not said.
    pub block_sizes: Option<[u32; 3]>,
    /// The lineage of the volume's content; only a server of blkrepl says it.
    pub lineage: Option<u128>,
}

/// Lists the exports of a server.
///
/// # Errors
/// What went wrong on the way.
pub fn list_exports(target: &Target, options: ClientOptions) -> Result<Vec<String>, NbdError> {
    let listed = ask_list(target, proto::NBD_OPT_LIST, &[], REPLIES_MAX, options)?;
    Ok(listed.into_iter().map(|(name, _)| name).collect())
}

/// Asks a node of a cluster which nodes have a volume.
///
/// # Errors
/// What went wrong on the way; also if the server is not one of blkrepl.
pub fn places(target: &Target, volume: &str, options: ClientOptions) -> Result<Vec<Place>, NbdError> {
    let listed = ask_list(target, proto::NBD_OPT_BLKREPL_NODES, volume.as_bytes(), PLACES_MAX, options)?;
    let place = |(address, details): (String, Vec<u8>)| Place { address, primary: details == [1] };
    Ok(listed.into_iter().map(place).collect())
}

/// Sends one option that is answered by a list, of `most` entries at most: of names, and details.
fn ask_list(
    target: &Target,
    wanted: u32,
    data: &[u8],
    most: u32,
    options: ClientOptions,
) -> Result<Vec<(String, Vec<u8>)>, NbdError> {
    let deadline = super::deadline_after(options.connect_timeout);
    let sock = Sock::connect(target, deadline)?;
    greet(&sock, deadline)?;
    sock.send_all(&option(wanted, data), deadline)?;
    let mut listed = Vec::new();
    for _ in 0..=most {
        let (reply, data) = receive_reply(&sock, wanted, deadline)?;
        match reply {
            proto::NBD_REP_ACK => {
                // A courtesy; the server closes in any case.
                let _ = sock.send_all(&option(proto::NBD_OPT_ABORT, &[]), deadline);
                return Ok(listed);
            }
            proto::NBD_REP_SERVER => listed.push(entry(&data)?),
            other => return Err(NbdError::Protocol(format!("option reply {other:#x} to option {wanted}"))),
        }
    }
    Err(NbdError::Protocol(format!("option {wanted} is answered by more than {most} entries")))
}

/// Negotiates up to the transmission phase.
pub(super) fn go(
    sock: &Sock,
    export: &str,
    session: Option<ClientSession>,
    deadline: Instant,
) -> Result<ExportFacts, NbdError> {
    let name_len = u32::try_from(export.len()).ok().filter(|_| export.len() <= proto::STRING_BYTES_MAX);
    let name_len = name_len.ok_or_else(|| {
        NbdError::Usage(format!("an export name of {} bytes; NBD allows 4096", export.len()))
    })?;
    greet(sock, deadline)?;
    if let Some(session) = session {
        join(sock, session, deadline)?;
    }
    let mut data = name_len.to_be_bytes().to_vec();
    data.extend_from_slice(export.as_bytes());
    let wanted = [proto::NBD_INFO_BLOCK_SIZE, proto::NBD_INFO_BLKREPL_LINEAGE];
    let wanted = &wanted[..if session.is_some() { 2 } else { 1 }];
    data.extend_from_slice(&[0, wanted.len() as u8]);
    wanted.iter().for_each(|info| data.extend_from_slice(&info.to_be_bytes()));
    sock.send_all(&option(proto::NBD_OPT_GO, &data), deadline)?;
    let mut export = None;
    let mut block_sizes = None;
    let mut lineage = None;
    for _ in 0..REPLIES_MAX {
        let (reply, data) = receive_reply(sock, proto::NBD_OPT_GO, deadline)?;
        match reply {
            proto::NBD_REP_ACK => {
                let (size, flags) =
                    export.ok_or_else(|| NbdError::Protocol("NBD_OPT_GO without NBD_INFO_EXPORT".into()))?;
                return Ok(ExportFacts { size, flags, block_sizes, lineage });
            }
            proto::NBD_REP_INFO if data.len() < 2 => {
                return Err(NbdError::Protocol("an information reply without its type".into()));
            }
            proto::NBD_REP_INFO => match (be16(&data, 0), data.len()) {
                (proto::NBD_INFO_EXPORT, 12) => export = Some((be64(&data, 2), be16(&data, 10))),
                (proto::NBD_INFO_BLOCK_SIZE, 14) => {
                    block_sizes = Some([be32(&data, 2), be32(&data, 6), be32(&data, 10)]);
                }
                (proto::NBD_INFO_BLKREPL_LINEAGE, 18) => {
                    lineage = data.last_chunk().map(|bytes| u128::from_be_bytes(*bytes));
                }
                (proto::NBD_INFO_EXPORT | proto::NBD_INFO_BLOCK_SIZE, len) => {
                    return Err(NbdError::Protocol(format!("an information reply of {len} bytes")));
                }
                _ => {}
            },
            other => return Err(NbdError::Protocol(format!("option reply {other:#x} to NBD_OPT_GO"))),
        }
    }
    Err(NbdError::Protocol("NBD_OPT_GO is answered without end".into()))
}

/// Makes the connection one of a client session.
fn join(sock: &Sock, session: ClientSession, deadline: Instant) -> Result<(), NbdError> {
    let wanted = proto::NBD_OPT_BLKREPL_SESSION;
    let data = [&session.id.to_be_bytes()[..], &session.generation.to_be_bytes()].concat();
    sock.send_all(&option(wanted, &data), deadline)?;
    match receive_reply(sock, wanted, deadline)? {
        (proto::NBD_REP_ACK, _) => Ok(()),
        (other, _) => Err(NbdError::Protocol(format!("option reply {other:#x} to option {wanted}"))),
    }
}

fn greet(sock: &Sock, deadline: Instant) -> Result<(), NbdError> {
    let mut greeting = [0; proto::GREETING_LEN];
    sock.receive_exact(&mut greeting, deadline)?;
    if be64(&greeting, 0) != proto::NBDMAGIC || be64(&greeting, 8) != proto::IHAVEOPT {
        return Err(NbdError::Protocol("the greeting is not that of a newstyle NBD server".into()));
    }
    let flags = be16(&greeting, 16);
    if flags & proto::NBD_FLAG_FIXED_NEWSTYLE == 0 {
        return Err(NbdError::Protocol("the server does not speak fixed newstyle".into()));
    }
    let mut answer = proto::NBD_FLAG_C_FIXED_NEWSTYLE;
    if flags & proto::NBD_FLAG_NO_ZEROES != 0 {
        answer |= proto::NBD_FLAG_C_NO_ZEROES;
    }
    sock.send_all(&answer.to_be_bytes(), deadline)
}

fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let mut out = proto::IHAVEOPT.to_be_bytes().to_vec();
    out.extend_from_slice(&option.to_be_bytes());
    let len = u32::try_from(data.len()).expect("option data is a name and a few numbers");
    out.extend_from_slice(&len.to_be_bytes());
    out.extend_from_slice(data);
    out
}

/// One reply to `option`; error replies come out as [`NbdError::Refused`].
fn receive_reply(sock: &Sock, option: u32, deadline: Instant) -> Result<(u32, Vec<u8>), NbdError> {
    let mut header = [0; proto::OPTION_REPLY_HEADER_LEN];
    sock.receive_exact(&mut header, deadline)?;
    if be64(&header, 0) != proto::NBD_REP_MAGIC {
        return Err(NbdError::Protocol(format!("an option reply begins with {:#018x}", be64(&header, 0))));
    }
    let (answered, reply, len) = (be32(&header, 8), be32(&header, 12), be32(&header, 16));
    if answered != option {
        return Err(NbdError::Protocol(format!("a reply to option {answered} instead of {option}")));
    }
    if len > REPLY_BYTES_MAX {
        return Err(NbdError::Protocol(format!("an option reply of {len} bytes")));
    }
    let mut data = vec![0; len as usize];
    sock.receive_exact(&mut data, deadline)?;
    if reply & proto::NBD_REP_FLAG_ERROR != 0 {
        let message = String::from_utf8_lossy(&data).into_owned();
        return Err(NbdError::Refused { kind: RefusalKind::of(reply), message });
    }
    Ok((reply, data))
}

/// The name in an entry of a list, and what follows it.
fn entry(data: &[u8]) -> Result<(String, Vec<u8>), NbdError> {
    let entry = data.split_first_chunk::<4>().and_then(|(len, rest)| {
        let (name, details) = rest.split_at_checked(usize::try_from(u32::from_be_bytes(*len)).ok()?)?;
        Some((String::from_utf8(name.to_vec()).ok()?, details.to_vec()))
    });
    entry.ok_or_else(|| NbdError::Protocol("an entry of a list is not a name".into()))
}
