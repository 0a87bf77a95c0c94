//! The handshake, an option at a time: what a test wants said is said, what comes back is judged by its form.

use anyhow::{Result, ensure};

use super::session::{Form, Session};
use super::spec::*;
use super::wire::{Address, Wire, broken};

/// One reply to an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OptionReply {
    /// Its type, `NBD_REP_*`.
    pub kind: u32,
    /// Its data.
    pub data: Vec<u8>,
}

/// What a server says of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Export {
    /// Bytes.
    pub size: u64,
    /// Transmission flags.
    pub flags: u16,
}

/// A connection in its handshake.
pub struct Talk {
    /// The connection, for what has no function here.
    pub wire: Wire,
    form: Form,
}

impl Talk {
    /// Connects, and takes the greeting.
    ///
    /// # Errors
    /// Where the greeting is not one.
    pub fn greeted(address: &Address) -> Result<Self> {
        let mut wire = Wire::connect(address)?;
        let greeting = wire.take(18)?;
        ensure!(number(&greeting[..8]) == NBDMAGIC, "greeting: {greeting:02x?}");
        ensure!(number(&greeting[8..16]) == IHAVEOPT, "not newstyle: {greeting:02x?}");
        let flags = tiny(&greeting[16..]);
        ensure!(flags & NBD_FLAG_FIXED_NEWSTYLE != 0, "not fixed newstyle: {flags:#x}");
        ensure!(flags & !(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES) == 0, "unknown flag: {flags:#x}");
        Ok(Self { wire, form: Form::Simple })
    }

    /// The same, with both client flags sent.
    ///
    /// # Errors
    /// As [`Self::greeted`].
    pub fn begin(address: &Address) -> Result<Self> {
        let mut talk = Self::greeted(address)?;
        talk.wire.send(&(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES).to_be_bytes())?;
        Ok(talk)
    }

    /// The same, with replies of that form agreed to.
    ///
    /// # Errors
    /// As [`Self::greeted`], and where the server does not agree.
    pub fn agreed(address: &Address, form: Form) -> Result<Self> {
        let mut talk = Self::begin(address)?;
        talk.agree(form)?;
        Ok(talk)
    }

    /// Agrees on replies of that form.
    ///
    /// # Errors
    /// Where the server does not.
    pub fn agree(&mut self, form: Form) -> Result<()> {
        match form {
            Form::Simple => {}
            Form::Structured => self.acked(NBD_OPT_STRUCTURED_REPLY, &[]).map(drop)?,
            Form::Extended => self.acked(NBD_OPT_EXTENDED_HEADERS, &[]).map(drop)?,
        }
        self.form = form;
        Ok(())
    }

    /// The same, after options that the caller has sent himself and that have agreed on that form.
    pub(super) fn in_form(self, form: Form) -> Self {
        Self { form, ..self }
    }

    /// Sends an option.
    ///
    /// # Errors
    /// If the connection is closed.
    pub fn send(&mut self, option: u32, data: &[u8]) -> Result<()> {
        self.wire.send(&option_bytes(option, data))
    }

    /// Takes all replies to an option, the last of which is the final one.
    ///
    /// # Errors
    /// Where they break a rule of the specification.
    pub fn replies(&mut self, option: u32) -> Result<Vec<OptionReply>> {
        let mut replies = Vec::new();
        loop {
            let head = self.wire.take(20)?;
            ensure!(number(&head[..8]) == NBD_REP_MAGIC, broken("magic of an option's reply", &head));
            ensure!(short(&head[8..12]) == option, broken("the option replied to", &head));
            let (kind, len) = (short(&head[12..16]), short(&head[16..20]));
            let data = self.wire.take(len as usize)?;
            let error = kind & NBD_REP_FLAG_ERROR != 0;
            if error {
                judge_string("text of a refusal", &data)?;
            }
            ensure!(kind != NBD_REP_ACK || data.is_empty(), broken("data of an acknowledgement", &data));
            let last = error || kind == NBD_REP_ACK;
            replies.push(OptionReply { kind, data });
            if last {
                return Ok(replies);
            }
        }
    }

    /// Sends an option, and takes its replies.
    ///
    /// # Errors
    /// As [`Self::replies`].
    pub fn ask(&mut self, option: u32, data: &[u8]) -> Result<Vec<OptionReply>> {
        self.send(option, data)?;
        self.replies(option)
    }

    /// The same; the replies before the final one, which must be an acknowledgement.
    ///
    /// # Errors
    /// Also if the server refuses.
    pub fn acked(&mut self, option: u32, data: &[u8]) -> Result<Vec<OptionReply>> {
        let mut replies = self.ask(option, data)?;
        let last = replies.pop().map(|reply| (reply.kind, String::from_utf8_lossy(&reply.data).into_owned()));
        ensure!(matches!(last, Some((NBD_REP_ACK, _))), "option {option} is refused: {last:02x?}");
        Ok(replies)
    }

    /// The same; the only reply must be that refusal.
    ///
    /// # Errors
    /// If there is another one.
    pub fn refused(&mut self, option: u32, data: &[u8], kind: u32) -> Result<()> {
        let replies = self.ask(option, data)?;
        let kinds: Vec<u32> = replies.iter().map(|reply| reply.kind).collect();
        ensure!(kinds == [kind], "option {option} is answered by {kinds:x?}, not by {kind:x}");
        Ok(())
    }

    /// Chooses both metadata contexts; their numbers.
    ///
    /// # Errors
    /// If the server does not know them.
    pub fn choose(&mut self, export: &str, contexts: &[&str]) -> Result<Vec<u32>> {
        let said = self.acked(NBD_OPT_SET_META_CONTEXT, &meta_data(export, contexts))?;
        let numbers: Vec<u32> = said.iter().map(|reply| short(&reply.data[..4])).collect();
        ensure!(numbers.len() == contexts.len(), "{contexts:?} chosen, numbers {numbers:?}");
        Ok(numbers)
    }

    /// Goes on with an export.
    ///
    /// # Errors
    /// If the server refuses.
    pub fn go(mut self, export: &str) -> Result<(Session, Export)> {
        let said = self.acked(NBD_OPT_GO, &export_data(export, &[]))?;
        let export = export_of(&said)?;
        Ok((Session::new(self.wire, self.form), export))
    }

    /// The connection after `NBD_OPT_EXPORT_NAME` with its short answer.
    ///
    /// # Errors
    /// If it is closed.
    pub fn export_name(mut self, export: &str) -> Result<(Session, Export)> {
        self.send(NBD_OPT_EXPORT_NAME, export.as_bytes())?;
        let answer = self.wire.take(10)?;
        let export = Export { size: number(&answer[..8]), flags: tiny(&answer[8..]) };
        Ok((Session::new(self.wire, self.form), export))
    }
}

/// Size and flags among what was said of an export, which says them exactly once.
fn export_of(said: &[OptionReply]) -> Result<Export> {
    let infos = said.iter().filter(|reply| reply.data.starts_with(&NBD_INFO_EXPORT.to_be_bytes()));
    let infos: Vec<&OptionReply> = infos.collect();
    let [info] = infos[..] else { return Err(broken("NBD_INFO_EXPORT not exactly once", said)) };
    ensure!(info.kind == NBD_REP_INFO && info.data.len() == 12, broken("NBD_INFO_EXPORT", info));
    Ok(Export { size: number(&info.data[2..10]), flags: tiny(&info.data[10..]) })
}

/// An option as it goes over the wire.
///
/// # Panics
/// If its data is longer than 32 bits can say.
#[must_use]
pub fn option_bytes(option: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).expect("data of a test fits 32 bits");
    [&IHAVEOPT.to_be_bytes()[..], &option.to_be_bytes(), &len.to_be_bytes(), data].concat()
}

/// A string with its length before it.
fn counted(text: &[u8]) -> Vec<u8> {
    let len = u32::try_from(text.len()).expect("a name of a test fits 32 bits");
    [&len.to_be_bytes()[..], text].concat()
}

/// Data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[must_use]
pub fn export_data(export: &str, wanted: &[u16]) -> Vec<u8> {
    let count = u16::try_from(wanted.len()).expect("few are wanted");
    let wanted: Vec<u8> = wanted.iter().flat_map(|info| info.to_be_bytes()).collect();
    [&counted(export.as_bytes())[..], &count.to_be_bytes(), &wanted].concat()
}

/// Data of the two options for metadata contexts.
#[must_use]
pub fn meta_data(export: &str, queries: &[&str]) -> Vec<u8> {
    let count = u32::try_from(queries.len()).expect("few queries");
    let queries: Vec<u8> = queries.iter().flat_map(|query| counted(query.as_bytes())).collect();
    [&counted(export.as_bytes())[..], &count.to_be_bytes(), &queries].concat()
}

/// A string of the specification: UTF-8 without NUL, not too long.
pub(super) fn judge_string(what: &str, bytes: &[u8]) -> Result<()> {
    ensure!(bytes.len() <= STRING_MAX, "{what}: {} bytes", bytes.len());
    let text = std::str::from_utf8(bytes).map_err(|_| broken(what, bytes))?;
    ensure!(!text.contains('\0'), "{what} with NUL: {text:?}");
    Ok(())
}
