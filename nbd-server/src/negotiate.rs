//! The server's side of the fixed newstyle negotiation, sans-IO: bytes in, bytes and a verdict out.
//!
//! The machine says how many bytes it wants next ([`Negotiation::wants`]), and the caller reads exactly as
//! many, never more. So nothing of the transmission phase is ever read here, and the socket can be handed
//! over as it is, without left-over bytes. It does no I/O, knows no clock, and asks [`Exports`] only for
//! names and facts; it never attaches anything. Before a client enters the transmission phase it asks its caller
//! to have it admitted ([`Progress::Admit`]), which may take a while, and goes on with [`Negotiation::admitted`].
//!
//! Memory is bounded whatever the peer sends: an option's data is held only up to [`OPTION_BYTES_MAX`],
//! longer data is thrown away as it comes, up to [`OPTION_DRAIN_MAX`], and there are at most
//! [`OPTIONS_MAX`] options in a session.

use blkrepl_engine::reactor::ClientSession;
use thiserror::Error;

use crate::context::{Contexts, MetaRequest};
use crate::export::{ExportInfo, ExportRefusal, Exports, Replies};
use crate::proto::{self, be16, be32, be64, parse_string};

/// Longest option data that is looked at, in bytes: a longest name, and two longest queries for metadata contexts
/// or more information requests than exist.
pub const OPTION_BYTES_MAX: u32 = 16384;
/// Longest option data that is thrown away to keep the session; beyond it the connection is closed.
pub const OPTION_DRAIN_MAX: u32 = 1 << 20;
/// Most options in one session; one more closes the connection.
pub const OPTIONS_MAX: u32 = 1024;

/// What the machine needs next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// Exactly so many bytes, at most [`OPTION_BYTES_MAX`], given to [`Negotiation::advance`] in one piece.
    Bytes(usize),
    /// So many bytes to be read and thrown away, then an `advance` with no bytes.
    Discard(u32),
}

/// Where the negotiation stands after some input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Send what was put out, then go on with [`Negotiation::wants`].
    Continue,
    /// The client wants to be served this export. Nothing was put out. Go on with [`Negotiation::admitted`].
    Admit(ExportInfo),
    /// Send what was put out; the next byte from the client is the first request, on these terms.
    Transmission(Terms),
    /// Send what was put out, then close.
    Close(CloseReason),
}

/// What client and server have agreed to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Terms {
    /// The export.
    pub export: ExportInfo,
    /// The form of replies, and with it of requests.
    pub replies: Replies,
    /// The metadata contexts that the client chose.
    pub contexts: Contexts,
    /// The client session that the connection belongs to, if the client named one.
    pub session: Option<ClientSession>,
}

/// Why a negotiation ended without an export.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CloseReason {
    /// The client sent `NBD_OPT_ABORT`.
    #[error("the client ended the negotiation")]
    Aborted,
    /// A client flag that was not offered.
    #[error("client flags {0:#x} contain one that was not offered")]
    UnknownFlags(u32),
    /// An option that does not begin with `IHAVEOPT`.
    #[error("an option begins with {0:#018x} instead of IHAVEOPT")]
    BadMagic(u64),
    /// `NBD_OPT_EXPORT_NAME` cannot be refused in any other way.
    #[error("export {name:?} refused: {refusal}")]
    ExportNameRefused {
        /// The name that the client asked for.
        name: String,
        /// Why.
        refusal: ExportRefusal,
    },
    /// The data of `NBD_OPT_EXPORT_NAME` is not a name.
    #[error("the name in NBD_OPT_EXPORT_NAME is not a string of at most 4096 bytes")]
    ExportNameMalformed,
    /// `NBD_OPT_EXPORT_NAME` must not be used with extended headers, and cannot be refused in any other way.
    #[error("NBD_OPT_EXPORT_NAME after extended headers were agreed to")]
    ExportNameExtended,
    /// A client without `NBD_FLAG_C_FIXED_NEWSTYLE` cannot be told anything about other options.
    #[error("option {0} from a client that does not speak fixed newstyle")]
    NotFixedNewstyle(u32),
    /// Option data beyond [`OPTION_DRAIN_MAX`].
    #[error("option {option} with {len} bytes of data")]
    OptionTooLong {
        /// The option.
        option: u32,
        /// Its length.
        len: u32,
    },
    /// More than [`OPTIONS_MAX`] options.
    #[error("more than {OPTIONS_MAX} options in one negotiation")]
    TooManyOptions,
}

impl CloseReason {
    /// The client broke a rule, and did not only ask for what there is not.
    #[must_use]
    pub fn is_violation(&self) -> bool {
        !matches!(self, Self::Aborted | Self::ExportNameRefused { .. })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    ClientFlags,
    OptionHeader,
    OptionData { option: u32, len: u32 },
    OptionDiscard { option: u32, len: u32, reply: u32 },
    Admitting,
    Ended,
}

/// One negotiation.
#[derive(Clone, Debug)]
pub struct Negotiation {
    state: State,
    admitting: Option<Entering>,
    fixed_newstyle: bool,
    no_zeroes: bool,
    replies: Replies,
    selection: Option<Selection>,
    session: Option<ClientSession>,
    options: u32,
}

/// A client that wants to enter the transmission phase.
#[derive(Clone, Debug)]
struct Entering {
    info: ExportInfo,
    how: Entry,
}

/// The option by which it does.
#[derive(Clone, Debug)]
enum Entry {
    /// `NBD_OPT_EXPORT_NAME`, with the name as the client gave it.
    ExportName(String),
    /// `NBD_OPT_GO`, with the information that it asks for, two bytes each.
    Go(Vec<u8>),
}

/// The metadata contexts that were chosen, and for which export: that of the canonical name.
#[derive(Clone, Debug)]
struct Selection {
    export: String,
    contexts: Contexts,
}

impl Negotiation {
    /// Begins a negotiation and appends the server's greeting to `out`.
    #[must_use]
    pub fn new(out: &mut Vec<u8>) -> Self {
        out.extend_from_slice(&proto::NBDMAGIC.to_be_bytes());
        out.extend_from_slice(&proto::IHAVEOPT.to_be_bytes());
        let flags = proto::NBD_FLAG_FIXED_NEWSTYLE | proto::NBD_FLAG_NO_ZEROES;
        out.extend_from_slice(&flags.to_be_bytes());
        Self {
            state: State::ClientFlags,
            admitting: None,
            fixed_newstyle: false,
            no_zeroes: false,
            replies: Replies::default(),
            selection: None,
            session: None,
            options: 0,
        }
    }

    /// What is to be read next. Meaningless (0 bytes) once the negotiation has ended, or waits for an admission.
    #[must_use]
    pub fn wants(&self) -> Want {
        match self.state {
            State::ClientFlags => Want::Bytes(4),
            State::OptionHeader => Want::Bytes(proto::OPTION_HEADER_LEN),
            State::OptionData { len, .. } => Want::Bytes(len as usize),
            State::OptionDiscard { len, .. } => Want::Discard(len),
            State::Admitting | State::Ended => Want::Bytes(0),
        }
    }

    /// Takes the bytes that were wanted and appends what is to be sent to `out`.
    ///
    /// # Panics
    /// If the caller gives another number of bytes than was wanted, goes on after the end, or owes an
    /// [`admitted`](Self::admitted).
    pub fn advance(&mut self, bytes: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) -> Progress {
        let expected = match self.wants() {
            Want::Bytes(len) => len,
            Want::Discard(_) => 0,
        };
        assert_eq!(bytes.len(), expected, "the caller of a negotiation reads exactly what is wanted");
        let progress = match self.state {
            State::ClientFlags => self.on_client_flags(be32(bytes, 0)),
            State::OptionHeader => self.on_option_header(bytes, exports, out),
            State::OptionData { option, .. } => self.on_option(option, bytes, exports, out),
            State::OptionDiscard { option, reply, .. } => {
                self.state = State::OptionHeader;
                put_error(out, option, reply, refusal_text(reply));
                Progress::Continue
            }
            State::Admitting => panic!("a negotiation that waits for an admission was given other input"),
            State::Ended => panic!("a negotiation that has ended was given more input"),
        };
        self.enter_state(&progress);
        progress
    }

    /// Takes what became of [`Progress::Admit`] and appends what is to be sent to `out`.
    ///
    /// # Panics
    /// If no admission was asked for.
    pub fn admitted(&mut self, result: Result<(), ExportRefusal>, out: &mut Vec<u8>) -> Progress {
        let entering = self.admitting.take().expect("an admission is answered once, after it was asked for");
        self.state = State::OptionHeader;
        let progress = match (entering.how, result) {
            (Entry::Go(wanted), Ok(())) => {
                put_infos(out, proto::NBD_OPT_GO, &entering.info, self.replies, &wanted);
                put_reply(out, proto::NBD_OPT_GO, proto::NBD_REP_ACK, &[]);
                self.enter(entering.info)
            }
            (Entry::Go(_), Err(refusal)) => {
                put_refusal(out, proto::NBD_OPT_GO, &refusal);
                Progress::Continue
            }
            (Entry::ExportName(_), Ok(())) => {
                self.put_export(&entering.info, out);
                self.enter(entering.info)
            }
            (Entry::ExportName(name), Err(refusal)) => {
                Progress::Close(CloseReason::ExportNameRefused { name, refusal })
            }
        };
        self.enter_state(&progress);
        progress
    }

    fn enter_state(&mut self, progress: &Progress) {
        match progress {
            Progress::Continue => {}
            Progress::Admit(_) => self.state = State::Admitting,
            Progress::Transmission(_) | Progress::Close(_) => self.state = State::Ended,
        }
    }

    /// Asks for the admission of a client to an export.
    fn ask(&mut self, info: ExportInfo, how: Entry) -> Progress {
        self.admitting = Some(Entering { info: info.clone(), how });
        Progress::Admit(info)
    }

    fn on_client_flags(&mut self, flags: u32) -> Progress {
        if flags & !(proto::NBD_FLAG_C_FIXED_NEWSTYLE | proto::NBD_FLAG_C_NO_ZEROES) != 0 {
            return Progress::Close(CloseReason::UnknownFlags(flags));
        }
        self.fixed_newstyle = flags & proto::NBD_FLAG_C_FIXED_NEWSTYLE != 0;
        self.no_zeroes = flags & proto::NBD_FLAG_C_NO_ZEROES != 0;
        self.state = State::OptionHeader;
        Progress::Continue
    }

    fn on_option_header(&mut self, header: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) -> Progress {
        let magic = be64(header, 0);
        if magic != proto::IHAVEOPT {
            return Progress::Close(CloseReason::BadMagic(magic));
        }
        let (option, len) = (be32(header, 8), be32(header, 12));
        self.options += 1;
        if self.options > OPTIONS_MAX {
            return Progress::Close(CloseReason::TooManyOptions);
        }
        if option != proto::NBD_OPT_EXPORT_NAME && !self.fixed_newstyle {
            return Progress::Close(CloseReason::NotFixedNewstyle(option));
        }
        if len > OPTION_DRAIN_MAX {
            return Progress::Close(CloseReason::OptionTooLong { option, len });
        }
        let known = matches!(
            option,
            proto::NBD_OPT_EXPORT_NAME
                | proto::NBD_OPT_ABORT
                | proto::NBD_OPT_LIST
                | proto::NBD_OPT_INFO
                | proto::NBD_OPT_GO
                | proto::NBD_OPT_STRUCTURED_REPLY
                | proto::NBD_OPT_LIST_META_CONTEXT
                | proto::NBD_OPT_SET_META_CONTEXT
                | proto::NBD_OPT_EXTENDED_HEADERS
                | proto::NBD_OPT_BLKREPL_NODES
                | proto::NBD_OPT_BLKREPL_SESSION
        );
        if len == 0 {
            return if known {
                self.on_option(option, &[], exports, out)
            } else {
                put_error(out, option, proto::NBD_REP_ERR_UNSUP, refusal_text(proto::NBD_REP_ERR_UNSUP));
                Progress::Continue
            };
        }
        if known && len <= OPTION_BYTES_MAX {
            self.state = State::OptionData { option, len };
            return Progress::Continue;
        }
        if option == proto::NBD_OPT_EXPORT_NAME {
            return Progress::Close(CloseReason::ExportNameMalformed);
        }
        if option == proto::NBD_OPT_SET_META_CONTEXT {
            self.selection = None;
        }
        let reply = if known { proto::NBD_REP_ERR_TOO_BIG } else { proto::NBD_REP_ERR_UNSUP };
        self.state = State::OptionDiscard { option, len, reply };
        Progress::Continue
    }

    fn on_option(&mut self, option: u32, data: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) -> Progress {
        self.state = State::OptionHeader;
        match option {
            proto::NBD_OPT_EXPORT_NAME => self.on_export_name(data, exports),
            proto::NBD_OPT_ABORT => {
                // Data, if any, is ignored, as the specification wants it.
                put_reply(out, option, proto::NBD_REP_ACK, &[]);
                Progress::Close(CloseReason::Aborted)
            }
            proto::NBD_OPT_LIST => {
                on_list(data, exports, out);
                Progress::Continue
            }
            proto::NBD_OPT_STRUCTURED_REPLY => {
                self.on_structured_reply(data, out);
                Progress::Continue
            }
            proto::NBD_OPT_LIST_META_CONTEXT => {
                self.on_list_contexts(data, exports, out);
                Progress::Continue
            }
            proto::NBD_OPT_SET_META_CONTEXT => {
                self.on_set_contexts(data, exports, out);
                Progress::Continue
            }
            proto::NBD_OPT_EXTENDED_HEADERS => {
                self.on_extended_headers(data, out);
                Progress::Continue
            }
            proto::NBD_OPT_BLKREPL_NODES => {
                on_nodes(data, exports, out);
                Progress::Continue
            }
            proto::NBD_OPT_BLKREPL_SESSION => {
                self.on_session(data, out);
                Progress::Continue
            }
            _ => self.on_info(option, data, exports, out),
        }
    }

    fn on_structured_reply(&mut self, data: &[u8], out: &mut Vec<u8>) {
        let option = proto::NBD_OPT_STRUCTURED_REPLY;
        if !data.is_empty() {
            put_error(out, option, proto::NBD_REP_ERR_INVALID, "NBD_OPT_STRUCTURED_REPLY carries no data");
        } else if self.replies == Replies::Extended {
            let text = "extended headers were agreed to, and their replies are more than structured ones";
            put_error(out, option, proto::NBD_REP_ERR_EXT_HEADER_REQD, text);
        } else {
            self.replies = Replies::Structured;
            put_reply(out, option, proto::NBD_REP_ACK, &[]);
        }
    }

    fn on_extended_headers(&mut self, data: &[u8], out: &mut Vec<u8>) {
        let option = proto::NBD_OPT_EXTENDED_HEADERS;
        if data.is_empty() {
            self.replies = Replies::Extended;
            put_reply(out, option, proto::NBD_REP_ACK, &[]);
        } else {
            put_error(out, option, proto::NBD_REP_ERR_INVALID, "NBD_OPT_EXTENDED_HEADERS carries no data");
        }
    }

    fn on_session(&mut self, data: &[u8], out: &mut Vec<u8>) {
        let option = proto::NBD_OPT_BLKREPL_SESSION;
        let parts = data.split_first_chunk::<16>().map(|(id, rest)| (*id, <[u8; 8]>::try_from(rest)));
        if let Some((id, Ok(generation))) = parts {
            let (id, generation) = (u128::from_be_bytes(id), u64::from_be_bytes(generation));
            self.session = Some(ClientSession { id, generation });
            put_reply(out, option, proto::NBD_REP_ACK, &[]);
        } else {
            let text = "a client session is named by 16 bytes, and 8 bytes are its generation";
            put_error(out, option, proto::NBD_REP_ERR_INVALID, text);
        }
    }

    fn on_list_contexts(&self, data: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) {
        let option = proto::NBD_OPT_LIST_META_CONTEXT;
        if let Some((_, request)) = self.meta_request(option, data, exports, out) {
            // The number means nothing here.
            request.listed.iter().for_each(|context| put_context(out, option, 0, context.name()));
            put_reply(out, option, proto::NBD_REP_ACK, &[]);
        }
    }

    fn on_set_contexts(&mut self, data: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) {
        let option = proto::NBD_OPT_SET_META_CONTEXT;
        // What was chosen before is void, also if this fails.
        self.selection = None;
        if let Some((info, request)) = self.meta_request(option, data, exports, out) {
            let contexts = request.selected;
            contexts.iter().for_each(|context| put_context(out, option, context.id(), context.name()));
            put_reply(out, option, proto::NBD_REP_ACK, &[]);
            self.selection = Some(Selection { export: info.name, contexts });
        }
    }

    /// What one of the two options for metadata contexts asks, of which export; `None` if it was refused.
    fn meta_request<'a>(
        &self,
        option: u32,
        data: &'a [u8],
        exports: &dyn Exports,
        out: &mut Vec<u8>,
    ) -> Option<(ExportInfo, MetaRequest<'a>)> {
        if self.replies == Replies::Simple {
            let text = "metadata contexts need structured replies or extended headers, which come first";
            put_error(out, option, proto::NBD_REP_ERR_INVALID, text);
            return None;
        }
        let Some(request) = MetaRequest::parse(data) else {
            let text =
                "the lengths in the option's data contradict each other, or a name or query is not a string";
            put_error(out, option, proto::NBD_REP_ERR_INVALID, text);
            return None;
        };
        match open(exports, request.name) {
            Ok(info) => Some((info, request)),
            Err(refusal) => {
                put_refusal(out, option, &refusal);
                None
            }
        }
    }

    fn on_export_name(&mut self, data: &[u8], exports: &dyn Exports) -> Progress {
        if self.replies == Replies::Extended {
            return Progress::Close(CloseReason::ExportNameExtended);
        }
        let Some(name) = parse_string(data) else {
            return Progress::Close(CloseReason::ExportNameMalformed);
        };
        match open(exports, name) {
            Ok(info) => self.ask(info, Entry::ExportName(name.to_owned())),
            Err(refusal) => {
                Progress::Close(CloseReason::ExportNameRefused { name: name.to_owned(), refusal })
            }
        }
    }

    /// The answer to `NBD_OPT_EXPORT_NAME`.
    fn put_export(&self, info: &ExportInfo, out: &mut Vec<u8>) {
        out.extend_from_slice(&info.size.to_be_bytes());
        out.extend_from_slice(&info.transmission_flags(self.replies).to_be_bytes());
        if !self.no_zeroes {
            out.extend_from_slice(&[0; proto::EXPORT_NAME_ZEROES]);
        }
    }

    /// What was agreed to on an export that the client goes on with.
    fn enter(&self, info: ExportInfo) -> Progress {
        let chosen = self.selection.as_ref().filter(|chosen| chosen.export == info.name);
        let contexts = chosen.map_or(Contexts::NONE, |chosen| chosen.contexts);
        Progress::Transmission(Terms { export: info, replies: self.replies, contexts, session: self.session })
    }

    fn on_info(&mut self, option: u32, data: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) -> Progress {
        let Some(request) = InfoRequest::parse(data) else {
            let text = "the lengths in the option's data contradict each other, or the name is not a string";
            put_error(out, option, proto::NBD_REP_ERR_INVALID, text);
            return Progress::Continue;
        };
        match open(exports, request.name) {
            Ok(info) if option == proto::NBD_OPT_GO => {
                return self.ask(info, Entry::Go(request.wanted.to_vec()));
            }
            Ok(info) => {
                put_infos(out, option, &info, self.replies, request.wanted);
                put_reply(out, option, proto::NBD_REP_ACK, &[]);
            }
            Err(refusal) => put_refusal(out, option, &refusal),
        }
        Progress::Continue
    }
}

fn on_list(data: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) {
    if !data.is_empty() {
        put_error(out, proto::NBD_OPT_LIST, proto::NBD_REP_ERR_INVALID, "NBD_OPT_LIST carries no data");
        return;
    }
    for name in exports.list() {
        put_server(out, proto::NBD_OPT_LIST, &name, &[]);
    }
    put_reply(out, proto::NBD_OPT_LIST, proto::NBD_REP_ACK, &[]);
}

fn on_nodes(data: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) {
    let option = proto::NBD_OPT_BLKREPL_NODES;
    let Some(name) = parse_string(data) else {
        put_error(out, option, proto::NBD_REP_ERR_INVALID, "the option's data is not the name of a volume");
        return;
    };
    match exports.places(name) {
        Ok(places) => {
            for place in places {
                put_server(out, option, &place.address, &[u8::from(place.primary)]);
            }
            put_reply(out, option, proto::NBD_REP_ACK, &[]);
        }
        Err(refusal) => put_refusal(out, option, &refusal),
    }
}

/// One entry of a list: a name, and details. One that the protocol cannot carry is left out: nobody could ask for it.
fn put_server(out: &mut Vec<u8>, option: u32, name: &str, details: &[u8]) {
    let Some(len) = u32::try_from(name.len()).ok().filter(|_| name.len() <= proto::STRING_BYTES_MAX) else {
        return;
    };
    put_reply(out, option, proto::NBD_REP_SERVER, &[&len.to_be_bytes(), name.as_bytes(), details].concat());
}

/// `wanted`: the information that was asked for, two bytes each.
fn put_infos(out: &mut Vec<u8>, option: u32, info: &ExportInfo, replies: Replies, wanted: &[u8]) {
    let wants = |what: u16| wanted.chunks_exact(2).any(|pair| be16(pair, 0) == what);
    let mut export = proto::NBD_INFO_EXPORT.to_be_bytes().to_vec();
    export.extend_from_slice(&info.size.to_be_bytes());
    export.extend_from_slice(&info.transmission_flags(replies).to_be_bytes());
    put_reply(out, option, proto::NBD_REP_INFO, &export);
    if wants(proto::NBD_INFO_NAME) {
        let body = [&proto::NBD_INFO_NAME.to_be_bytes(), info.name.as_bytes()].concat();
        put_reply(out, option, proto::NBD_REP_INFO, &body);
    }
    if wants(proto::NBD_INFO_DESCRIPTION) {
        let body = [&proto::NBD_INFO_DESCRIPTION.to_be_bytes(), info.description().as_bytes()].concat();
        put_reply(out, option, proto::NBD_REP_INFO, &body);
    }
    if let Some(lineage) = info.lineage.filter(|_| wants(proto::NBD_INFO_BLKREPL_LINEAGE)) {
        let body = [&proto::NBD_INFO_BLKREPL_LINEAGE.to_be_bytes()[..], &lineage.to_be_bytes()].concat();
        put_reply(out, option, proto::NBD_REP_INFO, &body);
    }
    if wants(proto::NBD_INFO_BLOCK_SIZE) {
        let mut body = proto::NBD_INFO_BLOCK_SIZE.to_be_bytes().to_vec();
        for size in [info.min_block, info.preferred_block, info.max_payload] {
            body.extend_from_slice(&size.to_be_bytes());
        }
        put_reply(out, option, proto::NBD_REP_INFO, &body);
    }
}

/// Opens an export; the empty name means the only one.
fn open(exports: &dyn Exports, name: &str) -> Result<ExportInfo, ExportRefusal> {
    if !name.is_empty() {
        return exports.open(name);
    }
    let mut names = exports.list();
    match (names.pop(), names.len()) {
        (Some(only), 0) => exports.open(&only),
        (None, _) => Err(ExportRefusal::Unknown("this node has no volume".into())),
        (Some(_), others) => Err(ExportRefusal::Unknown(format!(
            "no export name was given and this node has {} volumes; name one of them",
            others + 1
        ))),
    }
}

/// Data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
struct InfoRequest<'a> {
    name: &'a str,
    /// Two bytes each.
    wanted: &'a [u8],
}

impl<'a> InfoRequest<'a> {
    /// `None` if the lengths contradict each other or the name is not a string.
    fn parse(data: &'a [u8]) -> Option<Self> {
        let (name_len, rest) = data.split_first_chunk::<4>()?;
        let name_len = usize::try_from(u32::from_be_bytes(*name_len)).ok()?;
        let (name, rest) = rest.split_at_checked(name_len)?;
        let (count, wanted) = rest.split_first_chunk::<2>()?;
        if wanted.len() != usize::from(u16::from_be_bytes(*count)) * 2 {
            return None;
        }
        Some(Self { name: parse_string(name)?, wanted })
    }
}

fn refusal_text(reply: u32) -> &'static str {
    if reply == proto::NBD_REP_ERR_TOO_BIG {
        "the option's data is longer than any that this server understands"
    } else {
        "this server does not support the option"
    }
}

fn put_context(out: &mut Vec<u8>, option: u32, id: u32, name: &str) {
    let body = [&id.to_be_bytes(), name.as_bytes()].concat();
    put_reply(out, option, proto::NBD_REP_META_CONTEXT, &body);
}

fn put_refusal(out: &mut Vec<u8>, option: u32, refusal: &ExportRefusal) {
    let reply = match refusal {
        ExportRefusal::Unknown(_) => proto::NBD_REP_ERR_UNKNOWN,
        ExportRefusal::Policy(_) => proto::NBD_REP_ERR_POLICY,
        ExportRefusal::Shutdown => proto::NBD_REP_ERR_SHUTDOWN,
    };
    put_error(out, option, reply, &refusal.to_string());
}

fn put_error(out: &mut Vec<u8>, option: u32, reply: u32, text: &str) {
    let end = text.floor_char_boundary(proto::STRING_BYTES_MAX);
    put_reply(out, option, reply, &text.as_bytes()[..end]);
}

fn put_reply(out: &mut Vec<u8>, option: u32, reply: u32, data: &[u8]) {
    let len = u32::try_from(data.len()).expect("an option reply is made of strings of at most 4096 bytes");
    out.extend_from_slice(&proto::NBD_REP_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&reply.to_be_bytes());
    out.extend_from_slice(&len.to_be_bytes());
    out.extend_from_slice(data);
}
