//! Carries out a parsed command line and turns the result into output and an exit code.
//!
//! Standard output carries results only; reasons and next steps go to standard error.

use std::io::Write;
use std::process::ExitCode;

use serde::Serialize;
use serde_json::json;
use tracing_subscriber::EnvFilter;

use crate::admin::client::{self, ANSWER_TIMEOUT, AdminClient};
use crate::admin::{Done, Request, SettingsChange, StatusView, VolumeView};
use crate::cli::{
    Cli, ClusterCommand, Command, EXIT_DONE, EXIT_FAILED, EventsArgs, MappedArgs, NodeCommand, VolumeCommand,
};
use crate::events::EventRecord;
use crate::serve::passed::Passed;
use crate::{bench, config, demo, dev, init, map, render, serve};

/// Runs the command, with the sockets that a service manager passed, of which only a node makes use.
/// 0 done, 1 refused or failed (2, wrong usage, is clap's).
pub fn main(cli: Cli, passed: Result<Vec<Passed>, String>) -> ExitCode {
    match dispatch(&cli, passed) {
        Ok(()) => ExitCode::from(EXIT_DONE),
        Err(error) if is_broken_pipe(&error) => ExitCode::from(EXIT_DONE),
        Err(error) => {
            eprintln!("blkrepl: {}", chain(&error));
            ExitCode::from(EXIT_FAILED)
        }
    }
}

/// An error with its causes, leaving out those whose words stand in the text before already.
pub fn chain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let words = cause.to_string();
        if text.is_empty() {
            text = words;
        } else if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
    }
    text
}

/// The reader of our output went away (`| head`): nothing failed.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

fn dispatch(cli: &Cli, passed: Result<Vec<Passed>, String>) -> anyhow::Result<()> {
    match &cli.command {
        Command::Serve(args) => {
            set_up_log("info");
            serve::run(config::load(&args.config)?, passed.map_err(anyhow::Error::msg)?)
        }
        Command::Init(args) => {
            let config = config::load(&args.config)?;
            let store = init::create(&config)?;
            let text = format!("initialised {} in {}", config.name, config.dir.display());
            print(cli, &json!({"node": config.name, "dir": config.dir, "store": store}), || text)
        }
        Command::Dev(args) => {
            set_up_log("warn");
            dev::run(args)
        }
        Command::Demo(args) => {
            set_up_log("warn");
            demo::run(args, cli.json)
        }
        Command::Bench(args) => {
            let report = bench::run(args)?;
            print(cli, &bench::json(&args.uri, &report), || bench::table(&report))
        }
        Command::Status => {
            let view = ask_status(cli)?;
            print(cli, &view, || render::status(&view))
        }
        Command::Volume(command) => volume(cli, command),
        Command::Promote(args) => change(
            cli,
            &Request::Promote {
                volume: args.volume.clone(),
                force: args.force,
                discard_inconsistent: args.discard_inconsistent,
            },
        ),
        Command::Demote(args) => change(cli, &Request::Demote { volume: args.volume.clone() }),
        Command::Move(args) => {
            change(cli, &Request::Move { volume: args.volume.clone(), to: args.to.clone() })
        }
        Command::Detach(args) => {
            change(cli, &Request::Detach { volume: args.volume.clone(), client: args.client.clone() })
        }
        Command::Map(args) => {
            set_up_log("info");
            map::map(args)
        }
        Command::Unmap(args) => {
            set_up_log("warn");
            let done = map::unmap(args)?;
            print(cli, &done, || done.text.clone())
        }
        Command::Mapped(MappedArgs { volume_of: Some(name) }) => {
            let volume = map::volume_of(name)?;
            print(cli, &json!({"volume": volume}), || volume.clone())
        }
        Command::Mapped(MappedArgs { volume_of: None }) => {
            let all = map::mapped()?;
            print(cli, &all, || map::table(&all))
        }
        Command::Node(NodeCommand::List) => {
            let view = ask_status(cli)?;
            print(cli, &view.nodes, || render::nodes(&view.nodes))
        }
        Command::Events(args) => events(cli, args),
        Command::Cluster(ClusterCommand::Recover(args)) => {
            set_up_log("warn");
            let report = init::recover(&config::load(&args.config)?, args.force)?;
            print(cli, &report, || report.text.clone())
        }
    }
}

fn volume(cli: &Cli, command: &VolumeCommand) -> anyhow::Result<()> {
    match command {
        VolumeCommand::Create(args) => {
            config::check_name(&args.volume).map_err(anyhow::Error::msg)?;
            change(
                cli,
                &Request::VolumeCreate {
                    volume: args.volume.clone(),
                    size: args.size,
                    replicas: args.replicas.clone(),
                    durability: args.durability.into(),
                    sharing: args.sharing.into(),
                },
            )
        }
        VolumeCommand::Set(args) => {
            let wanted = SettingsChange {
                peer_timeout_ms: args.peer_timeout,
                disk_timeout_ms: args.disk_timeout,
                intent_regions_max: args.intent_regions,
                resync_window_bytes: args.resync_window,
                resync_latency_ms: args.resync_latency,
            };
            if wanted == SettingsChange::default() && args.sharing.is_none() {
                anyhow::bail!("name at least one setting to change; see `blkrepl volume set --help`");
            }
            let sharing = args.sharing.map(Into::into);
            change(cli, &Request::VolumeSet { volume: args.volume.clone(), change: wanted, sharing })
        }
        VolumeCommand::Recreate(args) => change(
            cli,
            &Request::VolumeRecreate { volume: args.volume.clone(), discard_data: args.discard_data },
        ),
        VolumeCommand::List => {
            let view = ask_status(cli)?;
            print(cli, &view.volumes, || render::volumes(&view.volumes))
        }
        VolumeCommand::Show(args) => {
            let view = ask_status(cli)?;
            let known: Vec<&str> = view.volumes.iter().map(|v| v.name.as_str()).collect();
            let found: Option<&VolumeView> = view.volumes.iter().find(|v| v.name == args.volume);
            let Some(volume) = found else {
                anyhow::bail!("no volume is named '{}'; there are: {}", args.volume, known.join(", "));
            };
            print(cli, volume, || render::volume(volume))
        }
    }
}

fn events(cli: &Cli, args: &EventsArgs) -> anyhow::Result<()> {
    let mut client = AdminClient::connect(&cli.admin_socket(), ANSWER_TIMEOUT)?;
    client.send(&Request::Events { after: args.after, follow: args.follow })?;
    if !args.follow {
        let all: Vec<EventRecord> = client.receive()?.unwrap_or_default();
        let text = || all.iter().map(|e| format!("{}\n", render::event(e))).collect::<String>();
        return print(cli, &all, text);
    }
    client.wait_forever()?;
    while let Some(event) = client.receive::<EventRecord>()? {
        let line = if cli.json { serde_json::to_string(&event)? } else { render::event(&event) };
        writeln!(std::io::stdout().lock(), "{line}")?;
    }
    anyhow::bail!("the node ended the stream (it stopped?); run the command again when it is back")
}

fn ask_status(cli: &Cli) -> anyhow::Result<StatusView> {
    Ok(client::ask(&cli.admin_socket(), &Request::Status {}, ANSWER_TIMEOUT)?)
}

fn change(cli: &Cli, request: &Request) -> anyhow::Result<()> {
    let done: Done = client::ask(&cli.admin_socket(), request, ANSWER_TIMEOUT)?;
    print(cli, &done, || render::done(&done))
}

fn print(cli: &Cli, value: &impl Serialize, text: impl FnOnce() -> String) -> anyhow::Result<()> {
    let mut out = if cli.json { serde_json::to_string_pretty(value)? } else { text() };
    if !out.ends_with('\n') {
        out.push('\n');
    }
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(out.as_bytes())?;
    Ok(stdout.flush()?)
}

/// Logs go to standard error; `BLKREPL_LOG` (as `RUST_LOG`: `info`, `blkrepl_engine=debug`) sets what is
/// logged.
fn set_up_log(default: &str) {
    // openraft tells of every message to a node that is down; what an operator must know of it reaches the
    // log through the control plane.
    let filter = std::env::var("BLKREPL_LOG")
        .ok()
        .and_then(|text| EnvFilter::try_new(text).ok())
        .unwrap_or_else(|| EnvFilter::new(format!("{default},openraft=off")));
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
    // Only fails if a log is set up already, which then stays.
    let _already = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(ansi)
        // A log that cannot be written (its disk is full) must not become the node's trouble: the subscriber
        // would report that on standard error, which panics there if it is the same full disk.
        .log_internal_errors(false)
        .try_init();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_told_once() {
        let inner = std::io::Error::other("disk on fire");
        let told = anyhow::Error::new(inner).context("cannot write: disk on fire").context("cannot start");
        assert_eq!(chain(&told), "cannot start: cannot write: disk on fire");
    }
}
