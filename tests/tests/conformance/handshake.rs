//! Cases on the handshake: flags, options, information on exports, the choice of metadata contexts.
//!
//! Each begins a session of its own and asks what it needs of it; that the session goes on is shown by going on.

use anyhow::{Context, Result, ensure};
use blkrepl_tests::nbd::spec::*;
use blkrepl_tests::nbd::{
    Address, Form, OptionReply, Request, Talk, Wire, export_data, meta_data, option_bytes,
};

use super::{SIZE, Target, cases};

const ALLOCATION: &str = "base:allocation";
const DIRTY: &str = "blkrepl:dirty";
/// What the server keeps, without what depends on the form.
const FLAGS: u16 = NBD_FLAG_HAS_FLAGS
    | NBD_FLAG_SEND_FLUSH
    | NBD_FLAG_SEND_FUA
    | NBD_FLAG_SEND_TRIM
    | NBD_FLAG_SEND_WRITE_ZEROES
    | NBD_FLAG_CAN_MULTI_CONN
    | NBD_FLAG_SEND_CACHE;

/// Without the two flags that say what lies under the data, which is the machine's.
fn kept(flags: u16) -> u16 {
    flags & !(NBD_FLAG_ROTATIONAL | NBD_FLAG_SEND_FAST_ZERO)
}

cases! {
    Once:
        the_greeting_is_fixed_newstyle,
        client_flags_that_are_unknown_close,
        a_client_without_fixed_newstyle_has_export_name_only,
        export_name_has_124_zeroes_unless_they_were_left_out,
        export_name_of_an_unknown_export_closes,
        unknown_options_are_unsupported_and_the_session_goes_on,
        starttls_is_unsupported,
        an_option_without_its_magic_closes,
        abort_is_acknowledged_and_closes,
        list_names_the_export_and_takes_no_data,
        info_says_what_is_asked_for,
        an_unknown_export_is_refused_as_unknown,
        malformed_names_are_invalid,
        the_empty_name_is_the_default_export,
        data_that_is_too_long_is_too_big,
        data_without_end_closes,
        options_without_end_close,
        structured_replies_take_no_data,
        extended_headers_take_no_data,
        structured_replies_after_extended_headers_are_refused,
        export_name_after_extended_headers_closes,
        contexts_need_chunks;
    Each:
        transmission_flags_are_those_that_are_kept,
        go_after_info_says_the_same,
        options_sent_at_once_are_answered_in_order,
        a_handshake_byte_by_byte_is_understood;
    Compact:
        export_name_goes_on_in_the_form_agreed_to;
    Chunks:
        contexts_are_listed,
        contexts_are_chosen_under_numbers_of_their_own,
        wildcards_and_unknown_contexts_select_nothing,
        malformed_contexts_are_invalid,
        a_choice_is_void_after_one_that_fails,
        a_choice_outlives_questions_on_other_exports;
}

/// A connection that has said all its flags.
fn begin(target: &Target<'_>) -> Result<Talk> {
    Talk::begin(target.address)
}

/// That a handshake still works: the export can be gone on with, and read.
fn goes_on(talk: Talk, target: &Target<'_>) -> Result<()> {
    let (mut session, export) = talk.go(target.export)?;
    ensure!(export.size == SIZE, "size {}", export.size);
    session.read(0, 512)?;
    ensure!(session.disconnect()?.is_empty(), "replies to nothing");
    Ok(())
}

/// That these bytes end the handshake at once. A server that goes on would answer the option behind them, where one
/// that waits for more would also close in the end.
fn closes_on(talk: &mut Talk, bytes: &[u8]) -> Result<()> {
    talk.wire.send(&[bytes, &option_bytes(NBD_OPT_LIST, &[])].concat())?;
    talk.wire.expect_end()
}

/// That a node which is not primary refuses the export by policy, with a text, and is a server all the same.
pub(super) fn refuses_by_policy(address: &Address, export: &str) -> Result<()> {
    let mut talk = Talk::agreed(address, Form::Structured)?;
    for option in [NBD_OPT_INFO, NBD_OPT_GO] {
        let said = talk.ask(option, &export_data(export, &[NBD_INFO_NAME]))?;
        let [refusal] = &said[..] else { anyhow::bail!("{said:?}") };
        ensure!(refusal.kind == NBD_REP_ERR_POLICY && !refusal.data.is_empty(), "{refusal:?}");
    }
    talk.refused(NBD_OPT_SET_META_CONTEXT, &meta_data(export, &[ALLOCATION]), NBD_REP_ERR_POLICY)?;
    talk.refused(NBD_OPT_INFO, &export_data("none-of-that-name", &[]), NBD_REP_ERR_UNKNOWN)?;
    ensure!(talk.acked(NBD_OPT_LIST, &[])?.len() == 1, "the list is that of the cluster");
    closes_on(&mut talk, &option_bytes(NBD_OPT_EXPORT_NAME, export.as_bytes()))
}

/// One piece of information among replies.
fn info(said: &[OptionReply], kind: u16) -> Option<&[u8]> {
    said.iter().find_map(|reply| reply.data.strip_prefix(&kind.to_be_bytes()[..]))
}

fn the_greeting_is_fixed_newstyle(target: &Target<'_>) -> Result<()> {
    let talk = Talk::greeted(target.address)?;
    drop(talk);
    let mut wire = Wire::connect(target.address)?;
    let greeting = wire.take(18)?;
    ensure!(greeting[16..] == [0, 3], "both handshake flags are offered: {greeting:02x?}");
    Ok(())
}

fn client_flags_that_are_unknown_close(target: &Target<'_>) -> Result<()> {
    for flags in [4, 7, 0x8000_0001, u32::MAX] {
        let mut talk = Talk::greeted(target.address)?;
        closes_on(&mut talk, &u32::to_be_bytes(flags)).with_context(|| format!("client flags {flags:#x}"))?;
    }
    Ok(())
}

fn a_client_without_fixed_newstyle_has_export_name_only(target: &Target<'_>) -> Result<()> {
    let mut talk = Talk::greeted(target.address)?;
    talk.wire.send(&[0; 4])?;
    let (mut session, export) = talk.export_name(target.export)?;
    ensure!(export.size == SIZE && kept(export.flags) == FLAGS, "{export:?}");
    ensure!(session.wire.take(124)? == [0; 124], "124 zeroes");
    session.read(512, 512)?;
    let mut talk = Talk::greeted(target.address)?;
    talk.wire.send(&[0; 4])?;
    talk.send(NBD_OPT_LIST, &[])?;
    talk.wire.expect_end()
}

fn export_name_has_124_zeroes_unless_they_were_left_out(target: &Target<'_>) -> Result<()> {
    for (flags, zeroes) in [(NBD_FLAG_C_FIXED_NEWSTYLE, 124), (NBD_FLAG_C_NO_ZEROES, 0)] {
        let mut talk = Talk::greeted(target.address)?;
        talk.wire.send(&flags.to_be_bytes())?;
        let (mut session, export) = talk.export_name(target.export)?;
        ensure!(export.size == SIZE, "size {}", export.size);
        ensure!(session.wire.take(zeroes)?.iter().all(|byte| *byte == 0), "zeroes");
        session.read(0, 512)?;
    }
    Ok(())
}

fn export_name_of_an_unknown_export_closes(target: &Target<'_>) -> Result<()> {
    for name in ["none-of-that-name", "vol0\0", &"x".repeat(4097)] {
        closes_on(&mut begin(target)?, &option_bytes(NBD_OPT_EXPORT_NAME, name.as_bytes()))?;
    }
    Ok(())
}

fn unknown_options_are_unsupported_and_the_session_goes_on(target: &Target<'_>) -> Result<()> {
    let mut talk = begin(target)?;
    for option in [0, NBD_OPT_PEEK_EXPORT, 12, 0x7fff_0000, u32::MAX] {
        talk.refused(option, &[], NBD_REP_ERR_UNSUP)?;
        talk.refused(option, &[0x49; 30_000], NBD_REP_ERR_UNSUP)?;
    }
    goes_on(talk, target)
}

fn starttls_is_unsupported(target: &Target<'_>) -> Result<()> {
    let mut talk = begin(target)?;
    talk.refused(NBD_OPT_STARTTLS, &[], NBD_REP_ERR_UNSUP)?;
    goes_on(talk, target)
}

fn an_option_without_its_magic_closes(target: &Target<'_>) -> Result<()> {
    let bytes = [&NBDMAGIC.to_be_bytes()[..], &NBD_OPT_LIST.to_be_bytes(), &[0; 4]].concat();
    closes_on(&mut begin(target)?, &bytes)
}

fn abort_is_acknowledged_and_closes(target: &Target<'_>) -> Result<()> {
    for data in [&[][..], b"good-bye"] {
        let mut talk = begin(target)?;
        // What follows is not answered any more.
        talk.wire.send(&[option_bytes(NBD_OPT_ABORT, data), option_bytes(NBD_OPT_LIST, &[])].concat())?;
        let said = talk.replies(NBD_OPT_ABORT)?;
        ensure!(said == [OptionReply { kind: NBD_REP_ACK, data: Vec::new() }], "{said:?}");
        talk.wire.expect_end()?;
    }
    Ok(())
}

fn list_names_the_export_and_takes_no_data(target: &Target<'_>) -> Result<()> {
    let mut talk = begin(target)?;
    talk.refused(NBD_OPT_LIST, b"x", NBD_REP_ERR_INVALID)?;
    let said = talk.acked(NBD_OPT_LIST, &[])?;
    let [server] = &said[..] else { anyhow::bail!("{said:?}") };
    let len = number(&server.data[..4]) as usize;
    ensure!(server.kind == NBD_REP_SERVER, "{server:?}");
    ensure!(&server.data[4..4 + len] == target.export.as_bytes(), "{server:?}");
    ensure!(std::str::from_utf8(&server.data[4 + len..]).is_ok(), "{server:?}");
    goes_on(talk, target)
}

fn info_says_what_is_asked_for(target: &Target<'_>) -> Result<()> {
    let mut talk = begin(target)?;
    let wanted = [NBD_INFO_BLOCK_SIZE, 4711, NBD_INFO_NAME, NBD_INFO_DESCRIPTION, NBD_INFO_BLOCK_SIZE];
    let said = talk.acked(NBD_OPT_INFO, &export_data(target.export, &wanted))?;
    ensure!(said.iter().all(|reply| reply.kind == NBD_REP_INFO), "{said:?}");
    let sizes = info(&said, NBD_INFO_BLOCK_SIZE).context("no block sizes")?;
    let sizes: Vec<u64> = sizes.chunks(4).map(number).collect();
    ensure!(sizes == [1, 4096, 32 << 20], "block sizes {sizes:?}");
    let name = info(&said, NBD_INFO_NAME).context("no name")?;
    ensure!(name == target.export.as_bytes(), "name {name:?}");
    let text = info(&said, NBD_INFO_DESCRIPTION).context("no description")?;
    ensure!(std::str::from_utf8(text).is_ok_and(|text| text.len() <= STRING_MAX), "{text:?}");
    ensure!(info(&said, 4711).is_none(), "what is not known is passed over");
    let export = info(&said, NBD_INFO_EXPORT).context("no size")?;
    ensure!(number(&export[..8]) == SIZE && kept(tiny(&export[8..])) == FLAGS, "{export:02x?}");
    let least = talk.acked(NBD_OPT_INFO, &export_data(target.export, &[]))?;
    ensure!(info(&least, NBD_INFO_EXPORT) == Some(export), "{least:?}");
    goes_on(talk, target)
}

fn an_unknown_export_is_refused_as_unknown(target: &Target<'_>) -> Result<()> {
    let mut talk = begin(target)?;
    for option in [NBD_OPT_INFO, NBD_OPT_GO] {
        talk.refused(option, &export_data("none-of-that-name", &[]), NBD_REP_ERR_UNKNOWN)?;
    }
    goes_on(talk, target)
}

fn malformed_names_are_invalid(target: &Target<'_>) -> Result<()> {
    let mut talk = begin(target)?;
    let good = export_data(target.export, &[NBD_INFO_NAME]);
    let name = |bytes: &[u8]| [&(bytes.len() as u32).to_be_bytes()[..], bytes, &[0, 0]].concat();
    let malformed = [
        Vec::new(),
        good[..good.len() - 1].to_vec(),
        [&good[..], &[0]].concat(),
        [&u32::MAX.to_be_bytes()[..], b"vol0", &[0, 0]].concat(),
        [&5u32.to_be_bytes()[..], b"vol0", &[0, 0]].concat(),
        name(b"vol\xff"),
        name(b"vol0\0"),
        name(&[b'x'; STRING_MAX + 1]),
    ];
    for option in [NBD_OPT_INFO, NBD_OPT_GO] {
        for data in &malformed {
            talk.refused(option, data, NBD_REP_ERR_INVALID)?;
        }
    }
    goes_on(talk, target)
}

fn the_empty_name_is_the_default_export(target: &Target<'_>) -> Result<()> {
    let mut talk = begin(target)?;
    let said = talk.acked(NBD_OPT_INFO, &export_data("", &[NBD_INFO_NAME]))?;
    ensure!(info(&said, NBD_INFO_NAME) == Some(target.export.as_bytes()), "{said:?}");
    let (mut session, export) = talk.go("")?;
    ensure!(export.size == SIZE, "{export:?}");
    session.read(0, 512)?;
    Ok(())
}

fn data_that_is_too_long_is_too_big(target: &Target<'_>) -> Result<()> {
    let mut talk = begin(target)?;
    for option in [NBD_OPT_LIST, NBD_OPT_INFO, NBD_OPT_GO, NBD_OPT_STRUCTURED_REPLY] {
        talk.refused(option, &vec![0; 16_385], NBD_REP_ERR_TOO_BIG)?;
        talk.refused(option, &vec![0; 1 << 20], NBD_REP_ERR_TOO_BIG)?;
    }
    goes_on(talk, target)
}

fn data_without_end_closes(target: &Target<'_>) -> Result<()> {
    for len in [(1 << 20) + 1, u32::MAX] {
        let mut talk = begin(target)?;
        let head = [&IHAVEOPT.to_be_bytes()[..], &NBD_OPT_INFO.to_be_bytes(), &len.to_be_bytes()];
        talk.wire.send(&head.concat())?;
        talk.wire.expect_end()?;
    }
    Ok(())
}

fn options_without_end_close(target: &Target<'_>) -> Result<()> {
    let mut talk = begin(target)?;
    for _ in 0..1024 {
        talk.refused(NBD_OPT_STARTTLS, &[], NBD_REP_ERR_UNSUP)?;
    }
    talk.send(NBD_OPT_STARTTLS, &[])?;
    talk.wire.expect_end()
}

fn structured_replies_take_no_data(target: &Target<'_>) -> Result<()> {
    let mut talk = begin(target)?;
    talk.refused(NBD_OPT_STRUCTURED_REPLY, b"x", NBD_REP_ERR_INVALID)?;
    // Not agreed to, then.
    talk.refused(NBD_OPT_LIST_META_CONTEXT, &meta_data(target.export, &[]), NBD_REP_ERR_INVALID)?;
    goes_on(talk, target)
}

fn extended_headers_take_no_data(target: &Target<'_>) -> Result<()> {
    let mut talk = begin(target)?;
    talk.refused(NBD_OPT_EXTENDED_HEADERS, b"x", NBD_REP_ERR_INVALID)?;
    talk.agree(Form::Structured)?;
    goes_on(talk, target)
}

fn structured_replies_after_extended_headers_are_refused(target: &Target<'_>) -> Result<()> {
    let mut talk = Talk::agreed(target.address, Form::Structured)?;
    talk.agree(Form::Extended)?;
    talk.refused(NBD_OPT_STRUCTURED_REPLY, &[], NBD_REP_ERR_EXT_HEADER_REQD)?;
    goes_on(talk, target)
}

fn export_name_after_extended_headers_closes(target: &Target<'_>) -> Result<()> {
    let mut talk = Talk::agreed(target.address, Form::Extended)?;
    talk.send(NBD_OPT_EXPORT_NAME, target.export.as_bytes())?;
    talk.wire.expect_end()
}

fn contexts_need_chunks(target: &Target<'_>) -> Result<()> {
    let mut talk = begin(target)?;
    for option in [NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT] {
        talk.refused(option, &meta_data(target.export, &[ALLOCATION]), NBD_REP_ERR_INVALID)?;
    }
    goes_on(talk, target)
}

fn transmission_flags_are_those_that_are_kept(target: &Target<'_>) -> Result<()> {
    let (_session, export) = target.talk()?.go(target.export)?;
    let expected = FLAGS | if target.form.chunks() { NBD_FLAG_SEND_DF } else { 0 };
    let flags = kept(export.flags);
    ensure!(flags == expected, "flags {flags:#x} instead of {expected:#x}");
    ensure!(export.size == SIZE, "size {}", export.size);
    Ok(())
}

fn go_after_info_says_the_same(target: &Target<'_>) -> Result<()> {
    let mut talk = target.talk()?;
    let data = export_data(target.export, &[NBD_INFO_NAME, NBD_INFO_DESCRIPTION, NBD_INFO_BLOCK_SIZE]);
    let first = talk.acked(NBD_OPT_INFO, &data)?;
    let then = talk.acked(NBD_OPT_GO, &data)?;
    ensure!(first == then, "{first:?}, then {then:?}");
    // The next byte is that of a request, not of an option.
    talk.wire.send(&Request::new(NBD_CMD_DISC, 0, 0, 0).bytes(target.form))?;
    talk.wire.expect_end()
}

fn options_sent_at_once_are_answered_in_order(target: &Target<'_>) -> Result<()> {
    let mut talk = target.talk()?;
    talk.send(77, b"?")?;
    talk.send(NBD_OPT_LIST, &[])?;
    talk.send(NBD_OPT_INFO, &export_data("none-of-that-name", &[]))?;
    talk.send(NBD_OPT_GO, &export_data(target.export, &[]))?;
    // The request follows before the handshake is over.
    talk.wire.send(&Request::new(NBD_CMD_DISC, 0, 0, 0).bytes(target.form))?;
    let finals = [77, NBD_OPT_LIST, NBD_OPT_INFO, NBD_OPT_GO]
        .map(|option| talk.replies(option).map(|mut replies| replies.pop().map(|reply| reply.kind)));
    let finals: Vec<u32> = finals.into_iter().filter_map(Result::transpose).collect::<Result<_>>()?;
    ensure!(finals == [NBD_REP_ERR_UNSUP, NBD_REP_ACK, NBD_REP_ERR_UNKNOWN, NBD_REP_ACK], "{finals:x?}");
    talk.wire.expect_end()
}

fn a_handshake_byte_by_byte_is_understood(target: &Target<'_>) -> Result<()> {
    let mut talk = Talk::greeted(target.address)?;
    let flags = NBD_FLAG_C_FIXED_NEWSTYLE.to_be_bytes();
    let data = export_data(target.export, &[NBD_INFO_BLOCK_SIZE]);
    let len = data.len() as u32;
    let head = [&IHAVEOPT.to_be_bytes()[..], &NBD_OPT_INFO.to_be_bytes(), &len.to_be_bytes()].concat();
    for byte in [&flags[..], &head, &data].concat() {
        talk.wire.send(&[byte])?;
    }
    let said = talk.replies(NBD_OPT_INFO)?;
    ensure!(info(&said, NBD_INFO_EXPORT).is_some(), "{said:?}");
    talk.agree(target.form)?;
    goes_on(talk, target)
}

fn export_name_goes_on_in_the_form_agreed_to(target: &Target<'_>) -> Result<()> {
    let (mut session, export) = target.talk()?.export_name(target.export)?;
    ensure!((export.flags & NBD_FLAG_SEND_DF != 0) == target.form.chunks(), "{export:?}");
    session.write(4096, &[0x11; 512])?;
    let reply = session.done(Request::new(NBD_CMD_READ, 0, 4096, 512))?;
    ensure!((reply.pieces > 0) == target.form.chunks() && reply.data == [0x11; 512], "{reply:?}");
    Ok(())
}

/// Numbers and names of the contexts that an option brings.
fn contexts(talk: &mut Talk, option: u32, data: &[u8]) -> Result<Vec<(u32, String)>> {
    let said = talk.acked(option, data)?;
    ensure!(said.iter().all(|reply| reply.kind == NBD_REP_META_CONTEXT), "{said:?}");
    said.iter().map(|r| Ok((short(&r.data[..4]), String::from_utf8(r.data[4..].to_vec())?))).collect()
}

fn contexts_are_listed(target: &Target<'_>) -> Result<()> {
    let mut talk = target.talk()?;
    let list = |names: &[&str]| names.iter().map(|name| (0, (*name).to_owned())).collect::<Vec<_>>();
    let asked: [(&[&str], _); 6] = [
        (&[], list(&[ALLOCATION, DIRTY])),
        (&["base:"], list(&[ALLOCATION])),
        (&["blkrepl:"], list(&[DIRTY])),
        (&[ALLOCATION], list(&[ALLOCATION])),
        (&["x-none:", "base:nothing", "no colon", "blkrepl:"], list(&[DIRTY])),
        (&["x-none:what"], Vec::new()),
    ];
    for (queries, expected) in asked {
        let data = meta_data(target.export, queries);
        let listed = contexts(&mut talk, NBD_OPT_LIST_META_CONTEXT, &data)?;
        ensure!(listed == expected, "{queries:?} lists {listed:?}");
    }
    goes_on(talk, target)
}

fn contexts_are_chosen_under_numbers_of_their_own(target: &Target<'_>) -> Result<()> {
    let mut talk = target.talk()?;
    let data = meta_data(target.export, &[DIRTY, ALLOCATION, DIRTY, "x-none:what"]);
    let chosen = contexts(&mut talk, NBD_OPT_SET_META_CONTEXT, &data)?;
    let mut names: Vec<&str> = chosen.iter().map(|(_, name)| name.as_str()).collect();
    names.sort_unstable();
    ensure!(names == [ALLOCATION, DIRTY], "chosen {chosen:?}");
    ensure!(chosen[0].0 != chosen[1].0, "one number for both: {chosen:?}");
    let (mut session, _) = talk.go(target.export)?;
    let reply = session.done(Request::new(NBD_CMD_BLOCK_STATUS, 0, 0, 65_536))?;
    let mut said: Vec<u32> = reply.status.iter().map(|(number, _)| *number).collect();
    let mut expected: Vec<u32> = chosen.iter().map(|(number, _)| *number).collect();
    said.sort_unstable();
    expected.sort_unstable();
    ensure!(said == expected, "{said:?} said, {expected:?} chosen");
    Ok(())
}

/// Goes on with the export, where no context is chosen.
fn goes_on_without_contexts(talk: Talk, target: &Target<'_>) -> Result<()> {
    let (mut session, _) = talk.go(target.export)?;
    session.fails(Request::new(NBD_CMD_BLOCK_STATUS, 0, 0, 4096), NBD_EINVAL)?;
    session.read(0, 512).map(drop)
}

fn wildcards_and_unknown_contexts_select_nothing(target: &Target<'_>) -> Result<()> {
    let mut talk = target.talk()?;
    for queries in [&["base:"][..], &["blkrepl:"], &["x-none:what", "no colon", "base:nothing"], &[]] {
        let data = meta_data(target.export, queries);
        let chosen = contexts(&mut talk, NBD_OPT_SET_META_CONTEXT, &data)?;
        ensure!(chosen.is_empty(), "{queries:?} choose {chosen:?}");
    }
    goes_on_without_contexts(talk, target)
}

fn malformed_contexts_are_invalid(target: &Target<'_>) -> Result<()> {
    let mut talk = target.talk()?;
    let good = meta_data(target.export, &[ALLOCATION]);
    let long = "x".repeat(STRING_MAX + 1);
    let malformed = [
        Vec::new(),
        good[..good.len() - 1].to_vec(),
        [&good[..], &[0]].concat(),
        [&u32::MAX.to_be_bytes()[..], b"vol0", &[0; 4]].concat(),
        [&4u32.to_be_bytes()[..], b"vol0", &u32::MAX.to_be_bytes()].concat(),
        meta_data(target.export, &["base:\0"]),
        meta_data(target.export, &[&long]),
        meta_data(&long, &[]),
    ];
    for option in [NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT] {
        for data in &malformed {
            talk.refused(option, data, NBD_REP_ERR_INVALID)?;
        }
        talk.refused(option, &meta_data("none-of-that-name", &[]), NBD_REP_ERR_UNKNOWN)?;
        talk.refused(option, &[0; 20_000], NBD_REP_ERR_TOO_BIG)?;
    }
    goes_on(talk, target)
}

fn a_choice_is_void_after_one_that_fails(target: &Target<'_>) -> Result<()> {
    for (data, kind) in [(vec![0; 3], NBD_REP_ERR_INVALID), (vec![0; 20_000], NBD_REP_ERR_TOO_BIG)] {
        let mut talk = target.talk()?;
        talk.choose(target.export, &[ALLOCATION, DIRTY])?;
        talk.refused(NBD_OPT_SET_META_CONTEXT, &data, kind)?;
        goes_on_without_contexts(talk, target)?;
    }
    Ok(())
}

fn a_choice_outlives_questions_on_other_exports(target: &Target<'_>) -> Result<()> {
    let mut talk = target.talk()?;
    talk.choose(target.export, &[ALLOCATION])?;
    talk.refused(NBD_OPT_INFO, &export_data("none-of-that-name", &[]), NBD_REP_ERR_UNKNOWN)?;
    let (mut session, _) = talk.go(target.export)?;
    session.done(Request::new(NBD_CMD_BLOCK_STATUS, 0, 0, 4096)).map(drop)
}
