//! Guest machines under qemu, each a data node with a kernel of its own: what a cut of power does to the page cache,
//! the file system's journal and the disk's cache happens to them for real.
//!
//! A guest's disks are [`Disk`]s of the harness: a cut ends qemu with SIGKILL and then takes from the disks a
//! random part of what was not flushed. The guests' network is qemu's own; they reach each other and the
//! witness, which runs on this machine, over its loopback, and nothing else is asked of it.

mod image;

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::process::Signal;
use tempfile::TempDir;

use crate::binary::blkrepl;
use crate::cluster::{COMMAND_LIMIT, free_ports, scratch_dir};
use crate::disk::Disk;
use crate::plan::{self, NodePlan};
use crate::proc::{self, Finished, Proc, run_ok};
use crate::report::{human, measured};
use crate::status::{Status, VolumeStatus};
use crate::wait::wait_for;
pub use image::{Image, unavailable};

/// Longest time from power on to a node that answers, with an emulated processor on a busy machine.
pub const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// Longest time until all replicas are in sync.
pub const SYNC_LIMIT: Duration = Duration::from_secs(180);
const STEP_LIMIT: Duration = Duration::from_secs(60);
/// Disk of a node's own state.
const STATE_LEN: u64 = 96 << 20;
/// Lease of the cluster: a guest with an emulated processor is slow.
const LEASE_MS: u64 = 2000;
/// How a guest sees this machine, and itself.
const HOST: &str = "10.0.2.2";
const GUEST: &str = "10.0.2.15";

/// One guest machine.
pub struct Guest {
    plan: NodePlan,
    disks: Vec<Disk>,
    qemu: Option<Proc>,
}

impl Guest {
    /// Its node's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.plan.name
    }

    /// Its disks.
    #[must_use]
    pub fn disks(&self) -> &[Disk] {
        &self.disks
    }

    fn boot(&mut self, image: &Image, dir: &Path) -> Result<()> {
        ensure!(self.qemu.is_none(), "{} runs already", self.plan.name);
        self.disks.iter().for_each(Disk::restore_power);
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        command.args(["-machine", "q35", "-cpu", "max", "-smp", "1", "-m", "320"]);
        for part in accelerators() {
            command.args(["-accel", part]);
        }
        command.args(["-serial", "stdio", "-kernel"]).arg(&image.kernel).arg("-initrd").arg(&image.initrd);
        let mutation = std::env::var("BLKREPL_MUTATION").unwrap_or_default();
        let name = &self.plan.name;
        let words = format!("console=ttyS0 quiet panic=-1 mitigations=off node={name} mutation={mutation}");
        command.args(["-append", &words]);
        for (index, disk) in self.disks.iter().enumerate() {
            let socket = disk.socket().display();
            command.args([
                "-blockdev",
                &format!("driver=nbd,node-name=d{index},server.type=unix,server.path={socket}"),
                "-device",
                &format!("virtio-blk-pci,drive=d{index},write-cache=on"),
            ]);
        }
        let mut net = "user,id=n0,ipv6=off".to_owned();
        for port in [self.plan.control, self.plan.peer, self.plan.nbd] {
            net += &format!(",hostfwd=tcp:127.0.0.1:{port}-{GUEST}:{port}");
        }
        command.args(["-netdev", &net, "-device", "virtio-net-pci,netdev=n0,romfile="]);
        let log = dir.join(format!("{}.console.log", self.plan.name));
        self.qemu = Some(Proc::spawn(&self.plan.name, &mut command, &log)?);
        Ok(())
    }
}

/// What qemu is to run a guest with, best first. Emulated throughout where the processor has no virtualisation of its
/// own: a /dev/kvm without it may be there and not work.
pub(crate) fn accelerators() -> &'static [&'static str] {
    if has_virtualisation() { &["kvm", "tcg"] } else { &["tcg"] }
}

fn has_virtualisation() -> bool {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let able =
        cpu.lines().any(|line| line.starts_with("flags") && (line.contains(" vmx") || line.contains(" svm")));
    able && fs::File::options().read(true).write(true).open("/dev/kvm").is_ok()
}

/// Two guests with a replica each, and a witness on this machine.
pub struct GuestCluster {
    guests: Vec<Guest>,
    witness: NodePlan,
    witness_process: Option<Proc>,
    image: Image,
    size: u64,
    dir: TempDir,
}

impl GuestCluster {
    /// Boots both machines and makes the volume `vol0` of `size` bytes. One replica lies on a disk without a
    /// file system, the other in a file on ext4.
    ///
    /// # Errors
    /// Where a step fails, with the end of the guests' consoles.
    pub fn start(size: u64, seed: u64) -> Result<Self> {
        let dir = scratch_dir()?;
        let mut plans = plans(dir.path())?;
        let witness = plans.pop().ok_or_else(|| anyhow!("no witness"))?;
        let all = [&plans[..], std::slice::from_ref(&witness)].concat();
        let timing = plan::timing(Some(LEASE_MS));
        let configs: Vec<(String, String)> =
            all.iter().map(|plan| (plan.name.clone(), plan.config(&all, &timing, "vol0"))).collect();
        let image = Image::build(dir.path(), &configs)?;
        fs::create_dir_all(&witness.dir)?;
        fs::write(witness.dir.join("node.toml"), &configs[2].1).context("write the witness's config")?;
        let mut guests = Vec::new();
        for plan in plans {
            let mut disks =
                vec![Disk::new(dir.path(), &format!("{}a", plan.name), STATE_LEN, seed ^ plan.id)?];
            let state = disks[0].image().as_os_str().to_owned();
            run_ok("mkfs.ext4", &["-q".as_ref(), "-F".as_ref(), state.as_os_str()], STEP_LIMIT)?;
            if plan.data_path.is_some() {
                disks.push(Disk::new(dir.path(), &format!("{}b", plan.name), size, seed ^ plan.id ^ 0x100)?);
            }
            guests.push(Guest { plan, disks, qemu: None });
        }
        let mut cluster = Self { guests, witness, witness_process: None, image, size, dir };
        cluster.start_witness()?;
        let begun = Instant::now();
        for name in cluster.names() {
            cluster.boot(&name)?;
        }
        cluster.create_volume()?;
        measured("vm_power", &format!("two guests booted, a volume made in {}", human(begun.elapsed())));
        cluster.wait_in_sync(SYNC_LIMIT)?;
        Ok(cluster)
    }

    /// Names of the guests' nodes.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.guests.iter().map(|guest| guest.name().to_owned()).collect()
    }

    /// The guests.
    #[must_use]
    pub fn guests(&self) -> &[Guest] {
        &self.guests
    }

    /// NBD addresses of both, on loopback.
    #[must_use]
    pub fn targets(&self) -> Vec<String> {
        self.guests.iter().filter_map(|guest| guest.plan.entry("vol0").nbd_tcp).collect()
    }

    /// Turns a machine on; does not wait for it.
    ///
    /// # Errors
    /// Where qemu cannot be started.
    pub fn boot(&mut self, name: &str) -> Result<()> {
        let (image, dir) = (self.image.clone(), self.dir.path().to_owned());
        self.guest(name)?.boot(&image, &dir)
    }

    /// Cuts the power of machines, as nearly at once as can be: no qemu runs any more when the first disk
    /// loses what was not flushed.
    ///
    /// # Errors
    /// If one of them does not run.
    pub fn cut_power(&mut self, names: &[String]) -> Result<()> {
        for name in names {
            let guest = self.guest(name)?;
            guest.qemu.as_mut().ok_or_else(|| anyhow!("{name} is off"))?.signal(Signal::KILL)?;
        }
        for name in names {
            let guest = self.guest(name)?;
            if let Some(mut qemu) = guest.qemu.take() {
                qemu.wait(STEP_LIMIT)?;
            }
            guest.disks.iter().for_each(Disk::cut_power);
        }
        Ok(())
    }

    /// Runs a command on the witness.
    ///
    /// # Errors
    /// Only if it cannot be run or hangs.
    pub fn cli(&self, args: &[&str]) -> Result<Finished> {
        let mut command = Command::new(blkrepl()?);
        command.arg("--admin").arg(self.witness.dir.join("admin.sock")).args(args);
        proc::run(&mut command, COMMAND_LIMIT)
    }

    /// The volume, as the witness has it from whoever it can ask.
    ///
    /// # Errors
    /// If the witness does not answer.
    pub fn volume(&self) -> Result<VolumeStatus> {
        let done = self.cli(&["status", "--json"])?.ok()?;
        let status: Status = serde_json::from_str(&done.stdout).context("parse the status")?;
        status.volume("vol0").cloned()
    }

    /// Waits until both replicas are in sync.
    ///
    /// # Errors
    /// After `limit`, with the end of the guests' consoles.
    pub fn wait_in_sync(&self, limit: Duration) -> Result<VolumeStatus> {
        let waited = wait_for("both guests in sync", limit, || {
            let volume = self.volume()?;
            volume.all_in_sync()?;
            Ok(volume)
        });
        waited.with_context(|| self.consoles())
    }

    /// The end of what the guests said.
    #[must_use]
    pub fn consoles(&self) -> String {
        let tail = |name: &str| {
            let text = fs::read(self.dir.path().join(format!("{name}.console.log"))).unwrap_or_default();
            format!("console of {name}:\n{}", proc::tail(&String::from_utf8_lossy(&text)))
        };
        self.names().iter().map(|name| tail(name)).collect::<Vec<_>>().join("\n")
    }

    /// Waits until a move to that node is done: only replicas in sync take it.
    ///
    /// # Errors
    /// If the move is refused for good.
    pub fn move_to(&self, name: &str) -> Result<()> {
        wait_for("the move", SYNC_LIMIT, || self.cli(&["move", "vol0", "--to", name])?.ok().map(drop))
    }

    /// Reads the whole volume once from each replica as primary, and compares. Nobody may write to it.
    ///
    /// # Errors
    /// Names the first block that differs.
    pub fn compare_replicas(&self) -> Result<()> {
        let mut contents = Vec::new();
        for name in self.names() {
            self.move_to(&name)?;
            let mut link = crate::verify::connect_any(&self.targets(), BOOT_LIMIT)?;
            let mut content = Vec::new();
            const PIECE: u32 = 1 << 20;
            while (content.len() as u64) < self.size {
                content.extend(link.read(content.len() as u64, PIECE)?);
            }
            contents.push(content);
        }
        let blocks = |at: usize| contents[at].chunks(4096);
        match blocks(0).zip(blocks(1)).position(|(one, other)| one != other) {
            Some(block) => bail!("the replicas differ, first in block {block}"),
            None => Ok(()),
        }
    }

    fn guest(&mut self, name: &str) -> Result<&mut Guest> {
        self.guests.iter_mut().find(|guest| guest.name() == name).ok_or_else(|| anyhow!("no guest {name}"))
    }

    fn start_witness(&mut self) -> Result<()> {
        let config = self.witness.dir.join("node.toml");
        let mut init = Command::new(blkrepl()?);
        proc::run(init.arg("init").arg("--config").arg(&config), COMMAND_LIMIT)?.ok()?;
        let mut serve = Command::new(blkrepl()?);
        serve.arg("serve").arg("--config").arg(&config);
        let log = self.dir.path().join("witness.log");
        self.witness_process = Some(Proc::spawn("witness", &mut serve, &log)?);
        Ok(())
    }

    fn create_volume(&self) -> Result<()> {
        let (size, replicas) = (self.size.to_string(), self.names().join(","));
        let made = wait_for("the cluster to take the volume", BOOT_LIMIT, || {
            if self.volume().is_ok() {
                return Ok(());
            }
            self.cli(&["volume", "create", "vol0", "--size", &size, "--replicas", &replicas])?.ok().map(drop)
        });
        made.with_context(|| self.consoles())
    }
}

impl Drop for GuestCluster {
    fn drop(&mut self) {
        // Machines before their disks.
        for guest in &mut self.guests {
            guest.qemu = None;
        }
    }
}

/// Two data nodes in guests and a witness here, each with the addresses at which it sees the others.
fn plans(dir: &Path) -> Result<Vec<NodePlan>> {
    let ports = free_ports(9)?;
    let at = |host: &str, port: u16| -> Result<SocketAddr> { Ok(SocketAddr::new(host.parse()?, port)) };
    let mut plans = Vec::new();
    for (id, ports) in (1u64..).zip(ports.chunks_exact(3)) {
        let guest = id <= 2;
        let home = if guest { "/n".into() } else { dir.join(format!("n{id}")) };
        let mut plan = NodePlan::new(id, guest, home, [ports[0], ports[1], ports[2]]);
        if guest {
            plan.listen = GUEST.parse()?;
            plan.peer_at = Some(at(HOST, plan.peer)?);
            plan.nbd_at = Some(at("127.0.0.1", plan.nbd)?);
            plan.control_at.insert(3 - id, at(HOST, plan.control)?);
            plan.control_at.insert(3, at("127.0.0.1", plan.control)?);
        } else {
            plan.control_at.insert(1, at(HOST, plan.control)?);
            plan.control_at.insert(2, at(HOST, plan.control)?);
        }
        plans.push(plan);
    }
    plans[0].data_path = Some("/dev/vdb".into());
    Ok(plans)
}
