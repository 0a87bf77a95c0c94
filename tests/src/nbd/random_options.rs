//! One random negotiation: noise, a good one with bytes changed, or options in any order whose replies are known.
//!
//! The first two may be answered by anything that is an option's reply, or not at all; the last exactly as
//! `docs/nbd.md` says. A negotiation that is noise may become requests on the export, with any effect.

use anyhow::{Context, Result, ensure};

use super::options::{Talk, export_data, meta_data, option_bytes};
use super::session::Form;
use super::spec::*;
use super::wire::{Address, Wire};
use crate::bits::Random;

const CONTEXTS: [&str; 6] =
    ["base:allocation", "blkrepl:dirty", "base:", "x-none:", "", "qemu:dirty-bitmap:b0"];

/// Negotiates once.
///
/// # Errors
/// Where an answer is not one of those that may come, or the connection stays open.
pub fn negotiate(address: &Address, export: &str, random: &mut Random) -> Result<()> {
    match random.below(4) {
        0 => shout(address, &noise(random)),
        1 => {
            let bytes = changed(good(export, random), random);
            shout(address, &bytes)
        }
        _ => by_the_rules(address, export, random),
    }
}

/// Bytes at random, behind a beginning that is right as far as it goes.
fn noise(random: &mut Random) -> Vec<u8> {
    let mut bytes = Vec::new();
    if random.chance(3, 4) {
        bytes.extend(3u32.to_be_bytes());
    }
    if random.chance(1, 2) {
        bytes.extend(IHAVEOPT.to_be_bytes());
        bytes.extend(u32::try_from(random.below(13)).unwrap_or(0).to_be_bytes());
    }
    if random.chance(1, 2) {
        bytes.extend((random.next() as u32 >> random.below(32)).to_be_bytes());
    }
    let len = random.below(2000);
    bytes.extend((0..len / 8).flat_map(|_| random.next().to_be_bytes()));
    bytes
}

/// A whole negotiation, and two requests.
fn good(export: &str, random: &mut Random) -> Vec<u8> {
    let mut form = Form::Simple;
    let mut bytes = 3u32.to_be_bytes().to_vec();
    for _ in 0..random.below(6) {
        let (option, data, _) = any_option(export, form, random);
        if option == NBD_OPT_STRUCTURED_REPLY && form == Form::Simple {
            form = Form::Structured;
        }
        bytes.extend(option_bytes(option, &data));
    }
    bytes.extend(option_bytes(NBD_OPT_GO, &export_data(export, &[])));
    for magic in [NBD_REQUEST_MAGIC, NBD_EXTENDED_REQUEST_MAGIC] {
        bytes.extend(magic.to_be_bytes());
        bytes.extend([0; 24]);
    }
    bytes
}

/// The same with some bytes changed, left out, repeated, or cut off.
fn changed(mut bytes: Vec<u8>, random: &mut Random) -> Vec<u8> {
    for _ in 0..=random.below(6) {
        let at = random.below(bytes.len() as u64) as usize;
        match random.below(5) {
            0 => drop(bytes.remove(at)),
            1 => bytes.insert(at, random.next() as u8),
            2 => {
                let end = (at + 1 + random.below(40) as usize).min(bytes.len());
                bytes.extend_from_within(at..end);
            }
            3 if at > 4 => bytes.truncate(at),
            _ => bytes[at] ^= 1 << random.below(8),
        }
    }
    bytes
}

/// Sends bytes, and takes what comes until the end. The server may close before it has them all.
fn shout(address: &Address, bytes: &[u8]) -> Result<()> {
    let mut wire = Wire::connect(address)?;
    let sent = wire.send(bytes).and_then(|()| wire.finish());
    let said = wire.rest().with_context(|| format!("{} bytes sent: {sent:?}", bytes.len()))?;
    let greeting = [&NBDMAGIC.to_be_bytes()[..], &IHAVEOPT.to_be_bytes(), &[0, 3]].concat();
    // After a reset the greeting may be lost.
    ensure!(said.starts_with(&greeting) || said.is_empty(), "no greeting: {said:02x?}");
    let mut rest = said.get(greeting.len()..).unwrap_or_default();
    while rest.len() >= 20 && rest.starts_with(&NBD_REP_MAGIC.to_be_bytes()) {
        let (kind, len) = (short(&rest[12..16]), short(&rest[16..20]) as usize);
        ensure!(kind & !NBD_REP_FLAG_ERROR <= 10, "a reply of type {kind:#x}");
        ensure!(len <= 16 << 10, "a reply of {len} bytes");
        rest = rest.get(20 + len..).unwrap_or_default();
    }
    Ok(())
}

/// An option with its data, and the type of its final reply.
fn any_option(export: &str, form: Form, random: &mut Random) -> (u32, Vec<u8>, u32) {
    let queries: Vec<&str> = (0..random.below(4)).map(|_| CONTEXTS[random.below(6) as usize]).collect();
    let infos: Vec<u16> = (0..random.below(5)).map(|_| random.below(6) as u16).collect();
    let meta = [NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT][random.below(2) as usize];
    let meta_ok = if form.chunks() { NBD_REP_ACK } else { NBD_REP_ERR_INVALID };
    let meta_unknown = if form.chunks() { NBD_REP_ERR_UNKNOWN } else { NBD_REP_ERR_INVALID };
    let structured = if form == Form::Extended { NBD_REP_ERR_EXT_HEADER_REQD } else { NBD_REP_ACK };
    let junk = vec![random.next() as u8; 1 + random.below(500) as usize];
    let known = [NBD_OPT_LIST, NBD_OPT_INFO, NBD_OPT_GO, NBD_OPT_STRUCTURED_REPLY, meta];
    let long = vec![0; 16_385 + random.below(40_000) as usize];
    let cut = |mut data: Vec<u8>, random: &mut Random| {
        data.truncate(random.below(data.len() as u64) as usize);
        data
    };
    match random.below(13) {
        0 => (NBD_OPT_LIST, Vec::new(), NBD_REP_ACK),
        1 => (NBD_OPT_LIST, junk, NBD_REP_ERR_INVALID),
        2 => (NBD_OPT_INFO, export_data(export, &infos), NBD_REP_ACK),
        3 => (NBD_OPT_INFO, export_data("none-of-that-name", &infos), NBD_REP_ERR_UNKNOWN),
        4 => (NBD_OPT_GO, cut(export_data(export, &infos), random), NBD_REP_ERR_INVALID),
        5 => (NBD_OPT_STRUCTURED_REPLY, Vec::new(), structured),
        6 => (NBD_OPT_EXTENDED_HEADERS, junk, NBD_REP_ERR_INVALID),
        7 => (NBD_OPT_EXTENDED_HEADERS, Vec::new(), NBD_REP_ACK),
        8 => (meta, meta_data(export, &queries), meta_ok),
        9 => (meta, meta_data("none-of-that-name", &queries), meta_unknown),
        10 => (meta, cut(meta_data(export, &queries), random), NBD_REP_ERR_INVALID),
        11 => (12 + random.next() as u32 / 2, junk, NBD_REP_ERR_UNSUP),
        _ => (known[random.below(5) as usize], long, NBD_REP_ERR_TOO_BIG),
    }
}

/// Options in any order, all sent before the first reply is read, in pieces; then one of the ways to end.
fn by_the_rules(address: &Address, export: &str, random: &mut Random) -> Result<()> {
    let mut form = Form::Simple;
    let (mut bytes, mut due) = (Vec::new(), Vec::new());
    for _ in 0..random.below(12) {
        let (option, data, kind) = any_option(export, form, random);
        match (option, kind) {
            (NBD_OPT_STRUCTURED_REPLY, NBD_REP_ACK) => form = Form::Structured,
            (NBD_OPT_EXTENDED_HEADERS, NBD_REP_ACK) => form = Form::Extended,
            _ => {}
        }
        bytes.extend(option_bytes(option, &data));
        due.push((option, kind));
    }
    let mut talk = Talk::begin(address)?;
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        let piece = (1 + random.below(4000) as usize).min(rest.len());
        talk.wire.send(&rest[..piece])?;
        rest = &rest[piece..];
    }
    for (option, kind) in due {
        let last = talk.replies(option)?.pop().map(|reply| reply.kind);
        ensure!(last == Some(kind), "option {option} is answered by {last:x?}, not {kind:x}");
    }
    end(talk, export, form, random)
}

fn end(mut talk: Talk, export: &str, form: Form, random: &mut Random) -> Result<()> {
    match random.below(4) {
        0 => {
            talk.acked(NBD_OPT_ABORT, &[])?;
            talk.wire.expect_end()
        }
        1 => talk.wire.send(&IHAVEOPT.to_be_bytes()[..random.below(8) as usize]),
        way => {
            // As after the options above, the form is the one that was agreed to.
            let talk = talk.in_form(form);
            let named = way == 2 && form != Form::Extended;
            let (mut session, _) = if named { talk.export_name(export)? } else { talk.go(export)? };
            session.read(random.below(1 << 20), 1 + random.below(4096))?;
            session.disconnect().map(drop)
        }
    }
}
