//! The floor program: `floor server` and `floor peer`. What it is: `blkrepl_benches::floor`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use blkrepl_benches::exit_code;
use blkrepl_benches::floor::{FloorOptions, serve};
use blkrepl_nbd::{ListenAddr, NbdUri};
use clap::{Args, Parser, Subcommand};

/// The least that a server of replicated writes can do; nothing survives anything. For measuring only.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// What clients connect to.
    Server(ServerArgs),
    /// What writes go to, too.
    Peer(PeerArgs),
}

#[derive(Args)]
struct ServerArgs {
    /// IP:PORT, or the path of a unix socket.
    #[arg(long)]
    listen: String,
    /// The file to write to; its size is that of the export.
    #[arg(long, required_unless_present = "no_storage", conflicts_with = "no_storage")]
    data: Option<PathBuf>,
    /// IP:PORT of `floor peer`.
    #[arg(long, required_unless_present_any = ["local_only", "no_storage"])]
    peer: Option<SocketAddr>,
    /// There is no peer.
    #[arg(long, conflicts_with = "peer")]
    local_only: bool,
    /// Nothing is stored; reads give whatever is in memory.
    #[arg(long)]
    no_storage: bool,
    /// Bytes of the export with --no-storage.
    #[arg(long, default_value_t = 1 << 30)]
    size: u64,
}

#[derive(Args)]
struct PeerArgs {
    /// IP:PORT.
    #[arg(long)]
    listen: SocketAddr,
    /// The file to write to.
    #[arg(long)]
    data: PathBuf,
}

fn main() -> ExitCode {
    exit_code("floor", run(&Cli::parse().command))
}

fn run(command: &Command) -> Result<()> {
    match command {
        Command::Server(args) => {
            if args.no_storage && args.peer.is_some() {
                bail!("--no-storage has no peer");
            }
            let peer = args.peer.map(|addr| NbdUri::tcp(addr.ip().to_string(), addr.port(), ""));
            let listen = listen_addr(&args.listen);
            serve(&FloorOptions { listen, data: args.data.clone(), size: args.size, peer })
        }
        Command::Peer(args) => serve(&FloorOptions {
            listen: ListenAddr::Tcp(args.listen),
            data: Some(args.data.clone()),
            size: 0,
            peer: None,
        }),
    }
}

fn listen_addr(text: &str) -> ListenAddr {
    text.parse().map_or_else(|_| ListenAddr::Unix(PathBuf::from(text)), ListenAddr::Tcp)
}
