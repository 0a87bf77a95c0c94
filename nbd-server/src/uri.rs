//! NBD addresses as people write them: `nbd://host[:port]/export` and `nbd+unix:///export?socket=PATH`.
//!
//! Text only; nothing is resolved or connected here. `nbds` (TLS) addresses are refused, never downgraded.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use thiserror::Error;

/// Port of NBD.
pub const NBD_PORT: u16 = 10809;

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// TCP.
    Tcp {
        /// Name or address, an IPv6 address without its brackets.
        host: String,
        /// Port.
        port: u16,
    },
    /// Unix socket.
    Unix(PathBuf),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

/// A server and one of its exports.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NbdUri {
    /// The server.
    pub target: Target,
    /// The export; empty for the server's only one.
    pub export: String,
}

/// Why a text is not an NBD address.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "{uri:?} is not an NBD address: {reason}; write nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH"
)]
pub struct UriError {
    /// The text.
    pub uri: String,
    /// What is wrong with it.
    pub reason: String,
}

impl NbdUri {
    /// An export on a unix socket.
    #[must_use]
    pub fn unix(path: impl Into<PathBuf>, export: impl Into<String>) -> Self {
        Self { target: Target::Unix(path.into()), export: export.into() }
    }

    /// An export over TCP.
    #[must_use]
    pub fn tcp(host: impl Into<String>, port: u16, export: impl Into<String>) -> Self {
        Self { target: Target::Tcp { host: host.into(), port }, export: export.into() }
    }
}

impl FromStr for NbdUri {
    type Err = UriError;

    fn from_str(uri: &str) -> Result<Self, UriError> {
        parse(uri).map_err(|reason| UriError { uri: uri.to_owned(), reason })
    }
}

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let export = escape(self.export.as_bytes());
        match &self.target {
            Target::Tcp { .. } => write!(f, "nbd://{}/{export}", self.target),
            Target::Unix(path) => {
                use std::os::unix::ffi::OsStrExt;
                write!(f, "nbd+unix:///{export}?socket={}", escape(path.as_os_str().as_bytes()))
            }
        }
    }
}

fn parse(uri: &str) -> Result<NbdUri, String> {
    let (scheme, rest) = uri.split_once("://").ok_or("it has no ://")?;
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let export = String::from_utf8(unescape(path)?).map_err(|_| "the export name is not UTF-8")?;
    match scheme {
        "nbd" | "nbd+tcp" => {
            if !query.is_empty() {
                return Err(format!("{query:?} means nothing for a TCP address"));
            }
            let (host, port) = parse_authority(authority)?;
            Ok(NbdUri { target: Target::Tcp { host, port }, export })
        }
        "nbd+unix" => {
            if !authority.is_empty() {
                return Err(format!("a unix address has no host, but {authority:?} stands there"));
            }
            Ok(NbdUri { target: Target::Unix(parse_socket(query)?), export })
        }
        "nbds" | "nbds+tcp" | "nbds+unix" => Err("TLS is not supported".into()),
        other => Err(format!("{other:?} is not a scheme of NBD")),
    }
}

fn parse_authority(authority: &str) -> Result<(String, u16), String> {
    let (host, port) = if let Some(rest) = authority.strip_prefix('[') {
        let (host, port) = rest.split_once(']').ok_or("a [ without its ]")?;
        let port = match port.strip_prefix(':') {
            Some(port) => Some(port),
            None if port.is_empty() => None,
            None => return Err(format!("{port:?} after the ]")),
        };
        (host, port)
    } else {
        match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        }
    };
    if host.is_empty() {
        return Err("the host is missing".into());
    }
    if host.contains(['[', ']', '%']) {
        return Err(format!("{host:?} is not a host"));
    }
    let port = match port {
        Some(port) => port.parse().map_err(|_| format!("{port:?} is not a port"))?,
        None => NBD_PORT,
    };
    Ok((host.to_owned(), port))
}

fn parse_socket(query: &str) -> Result<PathBuf, String> {
    use std::os::unix::ffi::OsStringExt;
    let mut socket = None;
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=') {
            Some(("socket", path)) if !path.is_empty() && socket.is_none() => socket = Some(unescape(path)?),
            _ => return Err(format!("{pair:?} is not socket=PATH")),
        }
    }
    let path = socket.ok_or("socket=PATH is missing")?;
    Ok(PathBuf::from(std::ffi::OsString::from_vec(path)))
}

fn unescape(text: &str) -> Result<Vec<u8>, String> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        if byte != b'%' {
            out.push(byte);
            rest = tail;
            continue;
        }
        let digits = tail.get(..2).and_then(|digits| std::str::from_utf8(digits).ok());
        let value = digits.filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()));
        let value = value.and_then(|d| u8::from_str_radix(d, 16).ok());
        out.push(value.ok_or("a % is not followed by two hexadecimal digits")?);
        rest = &tail[2..];
    }
    if out.contains(&0) {
        return Err("it contains a NUL".into());
    }
    Ok(out)
}

fn escape(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_usual_addresses_are_understood() {
        let cases = [
            ("nbd://127.0.0.1:4000/vol0", NbdUri::tcp("127.0.0.1", 4000, "vol0")),
            ("nbd://n1/vol0", NbdUri::tcp("n1", NBD_PORT, "vol0")),
            ("nbd://n1", NbdUri::tcp("n1", NBD_PORT, "")),
            ("nbd://[::1]:5/a/b", NbdUri::tcp("::1", 5, "a/b")),
            ("nbd+unix:///vol0?socket=/run/nbd.sock", NbdUri::unix("/run/nbd.sock", "vol0")),
            ("nbd+unix:///?socket=/run/a%20b", NbdUri::unix("/run/a b", "")),
            ("nbd+unix:///v%C3%BC?socket=x", NbdUri::unix("x", "v\u{fc}")),
        ];
        for (text, expected) in cases {
            assert_eq!(text.parse(), Ok(expected.clone()), "{text}");
            assert_eq!(expected.to_string().parse(), Ok(expected), "{text} and back");
        }
    }

    #[test]
    fn anything_else_is_refused_with_the_form_to_write() {
        let cases = [
            "",
            "vol0",
            "http://n1/vol0",
            "nbds://n1/vol0",
            "nbd:///vol0",
            "nbd://n1:70000/vol0",
            "nbd://[::1/vol0",
            "nbd://[[]/vol0",
            "nbd://n1/vol0?socket=/x",
            "nbd+unix:///vol0",
            "nbd+unix:///vol0?socket=",
            "nbd+unix://n1/vol0?socket=/x",
            "nbd+unix:///vol0?sock=/x",
            "nbd+unix:///vol0?socket=/x&socket=/y",
            "nbd://n1/%4",
            "nbd://n1/%+1",
            "nbd://n1/%00",
            "nbd://n1/%FF",
        ];
        for text in cases {
            let error = text.parse::<NbdUri>().unwrap_err().to_string();
            assert!(error.contains("nbd://HOST:PORT/EXPORT"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_address_is_read_as_it_is_shown(
            host in "[a-z0-9][a-z0-9.-]{0,12}|[0-9a-f]{0,4}::[0-9a-f]{1,4}", port in any::<u16>(),
            export in "[^\\x00]{0,12}", path in "[^\\x00]{1,20}",
        ) {
            for uri in [NbdUri::tcp(host, port, export.clone()), NbdUri::unix(path, export)] {
                let shown = uri.to_string();
                prop_assert!(shown.bytes().all(|b| b.is_ascii_graphic()), "{}", shown);
                prop_assert_eq!(shown.parse(), Ok(uri));
            }
        }

        #[test]
        fn any_text_is_understood_or_refused(text in "(nbd(\\+unix)?://)?[%\\[\\]:/?=a-z0-9&]{0,40}") {
            if let Ok(uri) = text.parse::<NbdUri>() {
                prop_assert_eq!(uri.to_string().parse(), Ok(uri));
            }
        }
    }
}
