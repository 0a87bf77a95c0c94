//! The command line: what can be said, and the exit code of each way to end.
//!
//! Parsing only; nothing is carried out here. Wrong usage ends with exit code 2 (clap does that).

use std::path::PathBuf;
use std::time::Duration;

use blkrepl_engine::control::RESYNC_WINDOW_MAX;
use blkrepl_nbd::bench::{BLOCK_SIZE_MAX, TIME_MAX};
use blkrepl_nbd::{NbdUri, Target};
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::map;
use crate::map::device::parse_node;

/// Done.
pub const EXIT_DONE: u8 = 0;
/// Refused or failed; reason and next step are on standard error.
pub const EXIT_FAILED: u8 = 1;
/// Admin socket that is asked when neither `--admin` nor `BLKREPL_ADMIN` says otherwise.
pub const ADMIN_SOCKET_DEFAULT: &str = "/run/blkrepl/admin.sock";

/// Keeps a block device identical on two machines, served over NBD.
#[derive(Debug, Parser)]
#[command(name = "blkrepl", version, propagate_version = true)]
pub struct Cli {
    /// Admin socket of the node to ask [default: $BLKREPL_ADMIN, else /run/blkrepl/admin.sock].
    #[arg(long, global = true, value_name = "SOCKET")]
    pub admin: Option<PathBuf>,
    /// Print JSON (stable, see docs/cli.md) in place of a table.
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Everything that the binary does.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run one node until SIGTERM or SIGINT.
    Serve(ConfigArg),
    /// Make a node's state directory, once, before its first start.
    Init(ConfigArg),
    /// Run two data nodes and a witness on loopback until interrupted.
    Dev(DevArgs),
    /// Kill a primary under load and show that nothing is lost.
    Demo(DemoArgs),
    /// Measure an NBD server under load. Jobs that write overwrite what the volume holds.
    Bench(BenchArgs),
    /// Show nodes, volumes and replicas.
    Status,
    /// Create, list and show volumes.
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Make the asked node primary of a volume.
    Promote(PromoteArgs),
    /// Let no node be primary of a volume until `promote`.
    Demote(VolumeArg),
    /// Hand a volume's primary role to another node; nothing is lost, clients see a pause.
    Move(MoveArgs),
    /// End the attachment of a client host to a volume: its connections are closed, another one may come.
    Detach(DetachArgs),
    /// Show a volume as a block device of this machine, and keep it on its primary until it is unmapped.
    Map(MapArgs),
    /// End a mapping of this machine.
    Unmap(UnmapArgs),
    /// Show what is mapped on this machine.
    Mapped(MappedArgs),
    /// List nodes.
    #[command(subcommand)]
    Node(NodeCommand),
    /// Show what happened on the asked node.
    Events(EventsArgs),
    /// Repair of a cluster that lost its quorum for good.
    #[command(subcommand)]
    Cluster(ClusterCommand),
}

/// Names a node's config file.
#[derive(Debug, Args)]
pub struct ConfigArg {
    /// The node's config file.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
}

/// Names a volume.
#[derive(Debug, Args)]
pub struct VolumeArg {
    /// Name of the volume.
    pub volume: String,
}

/// Timing of the nodes that `dev` and `demo` start. What is not given follows from the lease.
#[derive(Clone, Copy, Debug, Default, Args)]
pub struct TimingArgs {
    /// Lease length in milliseconds [default: 1500]; the other times shrink or grow with it.
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(100..=60_000))]
    pub leases: Option<u64>,
    /// Time between lease renewals in milliseconds.
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(10..=60_000))]
    pub renew: Option<u64>,
    /// Time between Raft heartbeats in milliseconds.
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(10..=60_000))]
    pub heartbeat: Option<u64>,
    /// Shortest Raft election timeout in milliseconds; the longest is twice that.
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(20..=60_000))]
    pub election: Option<u64>,
}

/// `blkrepl dev`.
#[derive(Debug, Args)]
pub struct DevArgs {
    /// Directory of the nodes; may exist, then its data is carried on with.
    #[arg(long)]
    pub dir: PathBuf,
    /// Size of the volume if it must be created.
    #[arg(long, default_value = "1GiB", value_parser = parse_size)]
    pub size: u64,
    /// Name of the volume.
    #[arg(long, default_value = "vol0")]
    pub volume: String,
    /// When a write is committed, if the volume must be created.
    #[arg(long, value_enum, default_value_t = DurabilityArg::Flush)]
    pub durability: DurabilityArg,
    /// Times.
    #[command(flatten)]
    pub timing: TimingArgs,
}

/// `blkrepl demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// File to write to the volume [default: this executable].
    pub file: Option<PathBuf>,
    /// Leave the cluster running and say how to use it.
    #[arg(long)]
    pub keep: bool,
    /// Directory to use; must not exist or be empty [default: a temporary one].
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// Size of the volume [default: what FILE needs, at least 64MiB].
    #[arg(long, value_parser = parse_size)]
    pub size: Option<u64>,
    /// Times.
    #[command(flatten)]
    pub timing: TimingArgs,
}

/// `blkrepl bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// What to measure: nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH, of any NBD server.
    pub uri: NbdUri,
    /// What is done.
    #[arg(long, value_enum, default_value_t = RwArg::Randread)]
    pub rw: RwArg,
    /// With --rw randrw: how many of 100 operations read.
    #[arg(long, value_name = "PERCENT", default_value_t = 70, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub mix: u8,
    /// Bytes of each operation.
    #[arg(long, value_name = "SIZE", default_value = "4KiB", value_parser = parse_block_size)]
    pub block_size: u32,
    /// Operations in flight on each connection.
    #[arg(long, default_value_t = 1)]
    pub depth: usize,
    /// Connections.
    #[arg(long, default_value_t = 1)]
    pub connections: usize,
    /// Follow each write with a flush; both together are one operation.
    #[arg(long)]
    pub flush_after_write: bool,
    /// Every write is to be on stable storage before it is answered.
    #[arg(long)]
    pub fua: bool,
    /// Seconds that are measured at most [default: 10, with --count 600].
    #[arg(long, value_parser = parse_seconds)]
    pub seconds: Option<Duration>,
    /// End after so many operations.
    #[arg(long)]
    pub count: Option<u64>,
    /// Seconds of load before anything is measured.
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = parse_seconds)]
    pub warm_up: Duration,
    /// First byte to touch.
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    pub offset: u64,
    /// Bytes to touch from there on [default: up to the end].
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub area: Option<u64>,
    /// Decides the random places and the content.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Process of the server, whose CPU time per operation is to be measured; may be repeated.
    #[arg(long = "pid", value_name = "PID")]
    pub pids: Vec<u32>,
    /// Confirms that what the volume holds in the area may be overwritten; without it no job writes.
    #[arg(long)]
    pub destroys_data: bool,
}

/// What `blkrepl bench` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RwArg {
    /// Reads anywhere.
    Randread,
    /// Writes anywhere.
    Randwrite,
    /// Both, anywhere.
    Randrw,
    /// Reads one after the other.
    Read,
    /// Writes one after the other.
    Write,
}

/// `blkrepl volume ...`.
#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// Create a volume; every replica starts as zeroes.
    Create(VolumeCreateArgs),
    /// List volumes.
    List,
    /// Show one volume.
    Show(VolumeArg),
    /// Change settings of a volume, at once and under load; what is not named stays.
    Set(VolumeSetArgs),
    /// Make this node's lost or refused replica anew, empty; it then gets everything by resync.
    Recreate(VolumeRecreateArgs),
}

/// `blkrepl volume create`.
#[derive(Debug, Args)]
pub struct VolumeCreateArgs {
    /// Name of the new volume.
    pub volume: String,
    /// Size, such as 512MiB, 10GiB or a number of bytes; a multiple of 4096.
    #[arg(long, value_parser = parse_size)]
    pub size: u64,
    /// Names of the nodes that hold a replica, separated by commas; the first starts as primary
    /// [default: all data nodes].
    #[arg(long, value_delimiter = ',')]
    pub replicas: Vec<String>,
    /// When a write is committed.
    #[arg(long, value_enum, default_value_t = DurabilityArg::Flush)]
    pub durability: DurabilityArg,
    /// How many client hosts may be attached at once.
    #[arg(long, value_enum, default_value_t = SharingArg::Exclusive)]
    pub sharing: SharingArg,
}

/// `blkrepl volume set`.
#[derive(Debug, Args)]
pub struct VolumeSetArgs {
    /// Name of the volume.
    pub volume: String,
    /// Latency budget of clients while a replica is resynced, in milliseconds: the resync yields when more than
    /// one request in a hundred takes longer [a new volume's: 10].
    #[arg(long, value_name = "MS")]
    pub resync_latency: Option<u64>,
    /// Most bytes of resync copies in flight per target, such as 16MiB [a new volume's: 4MiB].
    #[arg(long, value_name = "SIZE", value_parser = parse_window)]
    pub resync_window: Option<u32>,
    /// Most regions of 1 MiB that may be written to, or have been lately, without waiting for others to be
    /// cleared; after a crash of the primary so much is compared [a new volume's: 256].
    #[arg(long, value_name = "REGIONS")]
    pub intent_regions: Option<u32>,
    /// A member that answers nothing for so many milliseconds is taken out of the in-sync set [a new volume's:
    /// 1000].
    #[arg(long, value_name = "MS")]
    pub peer_timeout: Option<u64>,
    /// A disk request that takes more milliseconds makes its replica unhealthy [a new volume's: 30000].
    #[arg(long, value_name = "MS")]
    pub disk_timeout: Option<u64>,
    /// How many client hosts may be attached at once. With `exclusive` all clients are disconnected once, and the
    /// first that comes back has the volume [a new volume's: exclusive].
    #[arg(long, value_enum)]
    pub sharing: Option<SharingArg>,
}

/// `blkrepl volume recreate`.
#[derive(Debug, Args)]
pub struct VolumeRecreateArgs {
    /// Name of the volume.
    pub volume: String,
    /// Also when files of the replica exist: they are removed first.
    #[arg(long)]
    pub discard_data: bool,
}

/// When a write counts as committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DurabilityArg {
    /// Completed on every device of the ack set; flushes make it stable.
    Flush,
    /// Every write is stable before it is acknowledged.
    Always,
}

/// How many client hosts may be attached to a volume at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SharingArg {
    /// One, with any number of connections.
    Exclusive,
    /// Any number: for cluster file systems only, others are destroyed by that.
    Shared,
}

/// `blkrepl detach`.
#[derive(Debug, Args)]
pub struct DetachArgs {
    /// Name of the volume.
    pub volume: String,
    /// The client host, as `blkrepl status` names it.
    #[arg(long, value_name = "CLIENT")]
    pub client: String,
}

/// `blkrepl map`.
#[derive(Debug, Args)]
pub struct MapArgs {
    /// Name of the volume.
    pub volume: String,
    /// The device, such as /dev/nbd0 [default: one that is free].
    #[arg(value_name = "DEVICE", value_parser = parse_node)]
    pub device: Option<u32>,
    /// NBD address of a node of the cluster; may be repeated. One that can be reached is enough, it knows the
    /// others [default: those of --config].
    #[arg(long = "node", value_name = "HOST:PORT", value_parser = parse_nbd_address, conflicts_with = "config")]
    pub nodes: Vec<Target>,
    /// Config file of this machine's node [default: /etc/blkrepl/node.toml].
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Block size of the device in bytes; 512 for a file system that was made with sectors of 512 bytes.
    #[arg(long, value_name = "BYTES", default_value_t = 4096, value_parser = parse_device_block_size)]
    pub block_size: u32,
    /// Seconds without a primary after which requests fail [default: never; they wait].
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
    pub give_up_after: Option<u64>,
}

/// `blkrepl unmap`.
#[derive(Debug, Args)]
pub struct UnmapArgs {
    /// Name of the volume, or the device.
    #[arg(value_name = "VOLUME|DEVICE")]
    pub what: String,
    /// Although it is in use: what was not written is lost, and whoever uses it gets errors.
    #[arg(long)]
    pub force: bool,
}

/// `blkrepl mapped`.
#[derive(Debug, Args)]
pub struct MappedArgs {
    /// Print only the volume that this device (nbd0) shows; for the udev rule.
    #[arg(long, value_name = "DEVICE")]
    pub volume_of: Option<String>,
}

/// `blkrepl promote`.
#[derive(Debug, Args)]
pub struct PromoteArgs {
    /// Name of the volume.
    pub volume: String,
    /// Although this node is not in sync: starts a new lineage, discards what only others hold.
    #[arg(long)]
    pub force: bool,
    /// With --force: even a replica whose resync did not end.
    #[arg(long, requires = "force")]
    pub discard_inconsistent: bool,
}

/// `blkrepl move`.
#[derive(Debug, Args)]
pub struct MoveArgs {
    /// Name of the volume.
    pub volume: String,
    /// Name of the node that becomes primary.
    #[arg(long, value_name = "NODE")]
    pub to: String,
}

/// `blkrepl node ...`.
#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// List nodes.
    List,
}

/// `blkrepl events`.
#[derive(Debug, Args)]
pub struct EventsArgs {
    /// Go on printing events as they happen.
    #[arg(long)]
    pub follow: bool,
    /// Only events with a higher sequence number.
    #[arg(long, value_name = "SEQ", default_value_t = 0)]
    pub after: u64,
}

/// `blkrepl cluster ...`.
#[derive(Debug, Subcommand)]
pub enum ClusterCommand {
    /// With the node stopped: make it the sole voter of a new cluster. Other nodes are refused after that.
    Recover(RecoverArgs),
}

/// `blkrepl cluster recover`.
#[derive(Debug, Args)]
pub struct RecoverArgs {
    /// The node's config file.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Confirms that the other voters are gone for good.
    #[arg(long)]
    pub force: bool,
}

impl Cli {
    /// The admin socket to ask.
    pub fn admin_socket(&self) -> PathBuf {
        self.admin.clone().unwrap_or_else(|| {
            std::env::var_os("BLKREPL_ADMIN")
                .map_or_else(|| PathBuf::from(ADMIN_SOCKET_DEFAULT), PathBuf::from)
        })
    }
}

/// Reads a size: a number of bytes, or one followed by KiB, MiB, GiB or TiB (K, M, G, T mean the same).
///
/// # Errors
/// A sentence that says what is allowed.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let allowed =
        || format!("'{text}' is not a size; use bytes or a number with KiB, MiB, GiB or TiB, such as 10GiB");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits].parse().map_err(|_| allowed())?;
    let unit = match text[digits..].trim() {
        "" | "B" => 1,
        "K" | "KiB" => 1 << 10,
        "M" | "MiB" => 1 << 20,
        "G" | "GiB" => 1 << 30,
        "T" | "TiB" => 1u64 << 40,
        _ => return Err(allowed()),
    };
    number.checked_mul(unit).filter(|&n| n > 0).ok_or_else(allowed)
}

fn parse_nbd_address(text: &str) -> Result<Target, String> {
    map::locator::target_of(text)
        .ok_or_else(|| format!("'{text}' is not the NBD address of a node, such as 10.0.0.1:10809"))
}

fn parse_device_block_size(text: &str) -> Result<u32, String> {
    let size = text.parse().ok().filter(|size: &u32| size.is_power_of_two() && (512..=4096).contains(size));
    size.ok_or_else(|| format!("'{text}' is not a block size: 512, 1024, 2048 or 4096 bytes"))
}

fn parse_block_size(text: &str) -> Result<u32, String> {
    parse_size_up_to(text, BLOCK_SIZE_MAX, "one NBD request")
}

fn parse_window(text: &str) -> Result<u32, String> {
    parse_size_up_to(text, RESYNC_WINDOW_MAX, "the window of a resync")
}

fn parse_size_up_to(text: &str, max: u32, what: &str) -> Result<u32, String> {
    let size = parse_size(text)?;
    u32::try_from(size)
        .ok()
        .filter(|size| *size <= max)
        .ok_or_else(|| format!("{size} bytes are more than {what} may have; at most {max}"))
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.filter(|time| *time <= TIME_MAX).ok_or_else(|| {
        format!("'{text}' is not a number of seconds, such as 10 or 0.5, up to {}", TIME_MAX.as_secs())
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn global_flags_stand_before_or_after_the_command() {
        let cli = Cli::try_parse_from(["blkrepl", "--admin", "/a.sock", "status", "--json"]).unwrap();
        assert_eq!(cli.admin_socket(), PathBuf::from("/a.sock"));
        assert!(cli.json && matches!(cli.command, Command::Status));
    }

    #[test]
    fn wrong_usage_is_refused_with_code_2() {
        for args in [
            &["blkrepl"][..],
            &["blkrepl", "promote"],
            &["blkrepl", "promote", "v", "--discard-inconsistent"],
            &["blkrepl", "move", "v"],
            &["blkrepl", "serve"],
            &["blkrepl", "dev", "--dir", "d", "--size", "1gb"],
            &["blkrepl", "bench"],
            &["blkrepl", "bench", "not-an-address"],
            &["blkrepl", "bench", "nbd://h/v", "--block-size", "1GiB"],
            &["blkrepl", "bench", "nbd://h/v", "--seconds", "-1"],
            &["blkrepl", "bench", "nbd://h/v", "--mix", "101"],
        ] {
            assert_eq!(Cli::try_parse_from(args).unwrap_err().exit_code(), 2, "{args:?}");
        }
    }

    #[test]
    fn replicas_are_separated_by_commas() {
        let cli = Cli::try_parse_from([
            "blkrepl",
            "volume",
            "create",
            "v",
            "--size",
            "1MiB",
            "--replicas",
            "n1,n2",
        ])
        .unwrap();
        let Command::Volume(VolumeCommand::Create(args)) = cli.command else { panic!("wrong command") };
        assert_eq!(args.replicas, ["n1", "n2"]);
        assert_eq!(args.size, 1 << 20);
    }

    #[test]
    fn sizes() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("1GiB"), Ok(1 << 30));
        assert_eq!(parse_size("2M"), Ok(2 << 20));
        for bad in ["", "GiB", "1.5GiB", "-1", "0", "99999999999TiB", "1 gigs"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    /// Each way to write a unit, and by how many bits it shifts.
    const UNITS: [(&str, u32); 10] = [
        ("", 0),
        ("B", 0),
        ("K", 10),
        ("KiB", 10),
        ("M", 20),
        ("MiB", 20),
        ("G", 30),
        ("GiB", 30),
        ("T", 40),
        ("TiB", 40),
    ];

    fn unit() -> impl Strategy<Value = (&'static str, u32)> {
        proptest::sample::select(UNITS.to_vec())
    }

    proptest! {
        #[test]
        fn any_size_is_its_number_times_its_unit(
            (unit, shift) in unit(), bits in 0u32..64, any in any::<u64>(), spaces in "[0]{0,2}", gap in " {0,2}",
        ) {
            let number = any >> bits;
            let exact = u128::from(number) << shift;
            let expected = u64::try_from(exact).ok().filter(|size| *size > 0);
            let text = format!("{spaces}{number}{gap}{unit}");
            prop_assert_eq!(parse_size(&text).ok(), expected, "{}", text);
            let block = expected.and_then(|size| u32::try_from(size).ok()).filter(|size| *size <= BLOCK_SIZE_MAX);
            prop_assert_eq!(parse_block_size(&text).ok(), block, "{}", text);
        }

        #[test]
        fn any_other_text_is_no_size(text in "[0-9]{0,20}[ .,+-]{0,2}[A-Za-z]{0,4}|.{0,12}") {
            let unit = text.trim_start_matches(|c: char| c.is_ascii_digit());
            let known = UNITS.iter().any(|(word, _)| *word == unit.trim());
            match parse_size(&text) {
                Ok(size) => prop_assert!(size > 0 && known && unit.len() < text.len(), "{} is {}", text, size),
                Err(error) => prop_assert!(error.contains(&text) && error.contains("GiB"), "{}", error),
            }
        }

        #[test]
        fn any_time_up_to_the_limit_is_read_to_the_nanosecond(nanos in 0u64..2 * TIME_MAX.as_nanos() as u64) {
            let time = Duration::from_nanos(nanos);
            let text = format!("{}.{:09}", time.as_secs(), time.subsec_nanos());
            match parse_seconds(&text) {
                // An f64 is exact to far less than that.
                Ok(read) => prop_assert!(read.abs_diff(time) <= Duration::from_nanos(1) && read <= TIME_MAX),
                Err(error) => prop_assert!(time > TIME_MAX && error.contains(&text), "{}", error),
            }
        }

        #[test]
        fn any_text_is_a_time_or_refused(text in "-?(inf|nan|[0-9]{0,25})(\\.[0-9]{0,9})?(e-?[0-9]{1,4})?|.{0,12}") {
            match parse_seconds(&text) {
                Ok(time) => prop_assert!(time <= TIME_MAX && text.parse::<f64>().is_ok_and(|s| s > -1e-9)),
                Err(error) => prop_assert!(error.contains(&text) && error.contains("such as"), "{}", error),
            }
        }

        #[test]
        fn any_words_are_a_command_or_wrong_usage(
            words in proptest::collection::vec("(--)?[a-z]{0,8}(=.{0,4})?|status|volume|create|--size|.{0,6}", 0..6),
        ) {
            if let Err(error) = Cli::try_parse_from(std::iter::once("blkrepl".to_string()).chain(words)) {
                prop_assert!([0, 2].contains(&error.exit_code()), "{}", error);
            }
        }
    }
}
