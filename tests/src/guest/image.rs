//! What a guest machine boots: Debian's kernel for cloud machines (only unpacked, never installed) and an initial
//! file system with busybox, the binary under test and the shared libraries that it needs.
//!
//! Where the kernel is: `target/guest-kernel`, into which `tests/run` unpacks the package, or
//! `BLKREPL_GUEST_KERNEL`. Nothing is downloaded here.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use crate::binary::{blkrepl, target_dir};
use crate::proc::{run, run_ok, which};

const STEP_LIMIT: Duration = Duration::from_secs(60);
/// Drivers that the guest loads; the rest is built in. Which of them needs which differs between releases, so the
/// guest goes over them until all are loaded.
const MODULES: [&str; 9] = [
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko",
    "drivers/virtio/virtio_pci.ko",
    "drivers/block/virtio_blk.ko",
    "net/core/failover.ko",
    "drivers/net/net_failover.ko",
    "drivers/net/virtio_net.ko",
];
/// What the guest does: `node=NAME` on the kernel's command line says who it is, and `mutation=NAME` which
/// rule a binary built for that leaves out.
const INIT: &str = r#"#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc none /proc
$b mount -t sysfs none /sys
$b mount -t devtmpfs none /dev
for pass in 1 2 3 4; do
    for module in /modules/*; do
        [ -e $module ] && $b insmod $module 2>/dev/null && $b rm $module
    done
done
for module in /modules/*; do [ -e $module ] && echo "GUEST lacks $module"; done
$b ip link set lo up
$b ip addr add 10.0.2.15/24 dev eth0
$b ip link set eth0 up
$b ip route add default via 10.0.2.2
for word in $($b cat /proc/cmdline); do
    case $word in
        node=*) node=${word#node=} ;;
        mutation=?*) export BLKREPL_MUTATION=${word#mutation=} ;;
    esac
done
$b mount -t ext4 /dev/vda /n || { echo "GUEST cannot mount its disk"; $b poweroff -f; }
[ -e /n/control.redb ] || /bin/blkrepl init --config /config/$node.toml
echo "GUEST $node runs $($b uname -r)"
RUST_LOG=info /bin/blkrepl serve --config /config/$node.toml
echo "GUEST serve ended with $?"
$b sync
$b poweroff -f
"#;

/// The kernel's package, unpacked.
fn kernel_dir() -> Result<PathBuf> {
    match std::env::var_os("BLKREPL_GUEST_KERNEL") {
        Some(dir) => Ok(PathBuf::from(dir)),
        None => Ok(target_dir()?.join("guest-kernel")),
    }
}

/// The first entry of a directory whose name begins so.
fn first(dir: &Path, prefix: &str) -> Result<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(dir)
        .with_context(|| format!("list {}", dir.display()))?
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(prefix)))
        .collect();
    found.sort();
    found.pop().ok_or_else(|| anyhow!("nothing like {prefix}* in {}", dir.display()))
}

/// Why guests cannot be booted here; none if they can.
#[must_use]
pub fn unavailable() -> Option<String> {
    if std::env::consts::ARCH != "x86_64" {
        return Some("the guests are x86_64 machines".to_owned());
    }
    if let Some(reason) = crate::proc::missing(&["qemu-system-x86_64", "busybox", "mkfs.ext4", "ldd"]) {
        return Some(reason);
    }
    let kernel = kernel_dir().and_then(|dir| first(&dir.join("boot"), "vmlinuz-"));
    kernel.err().map(|reason| {
        format!(
            "no guest kernel ({reason:#}); tests/run fetches it, or unpack a linux-image-*-cloud-amd64 there"
        )
    })
}

/// A kernel and an initial file system.
#[derive(Clone, Debug)]
pub struct Image {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initial file system.
    pub initrd: PathBuf,
}

impl Image {
    /// Builds the initial file system in `dir`; `configs` are the nodes' `node.toml`, by name.
    ///
    /// # Errors
    /// Where a part is missing or a step fails.
    pub fn build(dir: &Path, configs: &[(String, String)]) -> Result<Self> {
        let unpacked = kernel_dir()?;
        let kernel = first(&unpacked.join("boot"), "vmlinuz-")?;
        let modules = first(&unpacked.join("lib/modules"), "")?.join("kernel");
        let root = dir.join("root");
        for name in ["bin", "modules", "config", "proc", "sys", "dev", "tmp", "n"] {
            fs::create_dir_all(root.join(name)).with_context(|| format!("make {name} of the guest"))?;
        }
        let busybox = which("busybox").ok_or_else(|| anyhow!("busybox is not installed"))?;
        put_program(&busybox, &root.join("bin/busybox"), &root)?;
        put_program(blkrepl()?, &root.join("bin/blkrepl"), &root)?;
        if which("strip").is_some() {
            // Debug information would be most of what the guest has to read.
            run_ok("strip", &[root.join("bin/blkrepl")], STEP_LIMIT)?;
        }
        for (index, module) in MODULES.iter().enumerate() {
            let name = module.rsplit('/').next().unwrap_or(module);
            put_module(&modules.join(module), &root.join(format!("modules/{index:02}-{name}")))?;
        }
        for (name, text) in configs {
            fs::write(root.join(format!("config/{name}.toml")), text).context("write a guest's config")?;
        }
        let init = root.join("init");
        fs::write(&init, INIT).context("write the guest's init")?;
        fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).context("make init executable")?;
        let initrd = dir.join("initrd");
        pack(&root, &initrd)?;
        Ok(Self { kernel, initrd })
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).with_context(|| format!("make {}", parent.display()))?;
    }
    fs::copy(from, to).with_context(|| format!("copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

/// A driver, which later releases compress; what a kernel has built in is no file.
fn put_module(from: &Path, to: &Path) -> Result<()> {
    if from.is_file() {
        return copy(from, to);
    }
    let packed = PathBuf::from(format!("{}.xz", from.display()));
    if packed.is_file() {
        fs::write(to, []).with_context(|| format!("make {}", to.display()))?;
        let script = "xz -dc \"$0\" >\"$1\"";
        run_ok("sh", &["-c".as_ref(), script.as_ref(), packed.as_os_str(), to.as_os_str()], STEP_LIMIT)?;
    }
    Ok(())
}

/// A program and its shared libraries, at the paths where the program looks for them.
fn put_program(from: &Path, to: &Path, root: &Path) -> Result<()> {
    copy(from, to)?;
    // A static program has none, and ldd says so with an error.
    let listed = run(Command::new("ldd").arg(from), STEP_LIMIT)?;
    let libraries: BTreeSet<&str> =
        listed.stdout.split_whitespace().filter(|word| word.starts_with('/')).collect();
    for library in libraries {
        let library = Path::new(library);
        let inside = root.join(library.strip_prefix("/").unwrap_or(library));
        if library.is_file() && !inside.exists() {
            copy(library, &inside)?;
        }
    }
    Ok(())
}

/// Packs a directory as the kernel wants it; it needs no compression here.
fn pack(root: &Path, initrd: &Path) -> Result<()> {
    let names = run_ok("sh", &["-c".as_ref(), "cd \"$0\" && find .".as_ref(), root.as_os_str()], STEP_LIMIT)?;
    let list = root.with_extension("list");
    fs::write(&list, names.stdout).context("write the list of the guest's files")?;
    let mut command = Command::new("busybox");
    command.args(["cpio", "-o", "-H", "newc"]).current_dir(root);
    command.stdin(File::open(&list)?).stdout(File::create(initrd)?).stderr(std::process::Stdio::null());
    let status = command.status().context("run busybox cpio")?;
    anyhow::ensure!(status.success(), "busybox cpio: {status}");
    Ok(())
}
