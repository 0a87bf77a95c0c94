//! One client host at a time: a second is refused with the name of the first, also after the primary moved or died;
//! an attachment ends with its last connection or by an operator's word, and a shared volume lets everybody in.
//!
//! Nodes and clients are in network namespaces, each a host with an address of its own.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use blkrepl_tests::client::{Link, LinkError};
use blkrepl_tests::cluster::{FAILOVER_LIMIT, SYNC_LIMIT};
use blkrepl_tests::netns::{self, Bridge, NetNs};
use blkrepl_tests::plan::NodePlan;
use blkrepl_tests::report::skipped;
use blkrepl_tests::wait::wait_for;
use blkrepl_tests::{Cluster, ClusterOptions, scenario};

const SIZE: u64 = 64 << 20;
const LIMIT: Duration = Duration::from_secs(20);
/// Names of the client hosts: ours, where the switch is, and one more on it.
const HERE: &str = "10.83.0.254";
const THERE: &str = "10.83.0.4";

/// Three nodes, each on a host of its own, and the host [`THERE`].
fn hosts() -> Result<(Arc<NetNs>, Cluster)> {
    let bridge = Bridge::new(4)?;
    let options = ClusterOptions { lease_ms: Some(700), ..ClusterOptions::by_hand(SIZE, 2) };
    let cluster = Cluster::prepare_wired(options, |plans| NodePlan::on_hosts(plans, &bridge))?;
    Ok((bridge.host(4), cluster))
}

struct Hosts<'a> {
    cluster: &'a mut Cluster,
    there: Arc<NetNs>,
}

impl Hosts<'_> {
    /// The primary by its status, which attaches nothing.
    fn primary(&self) -> Result<String> {
        wait_for("a primary that serves", FAILOVER_LIMIT, || {
            let status = self.cluster.volume_status()?;
            ensure!(status.more.get("serving").and_then(|s| s.as_bool()) == Some(true), "nobody serves");
            status.primary.context("no primary")
        })
    }

    /// Its address over TCP.
    fn address(&self) -> Result<String> {
        Ok(self.cluster.node(&self.primary()?)?.tcp()?.to_owned())
    }

    fn link_here(&self) -> Result<Link> {
        let address = self.address()?;
        // A new primary may not serve yet.
        wait_for("a connection from here", FAILOVER_LIMIT, || Ok(Link::connect(&address, LIMIT)?))
    }

    fn link_there(&self) -> Result<Result<Link, LinkError>> {
        let address = self.address()?;
        self.there.within(|| Ok(Link::connect(&address, LIMIT)))
    }

    /// The other host comes in, as soon as it may.
    fn wait_link_there(&self) -> Result<Link> {
        wait_for("a connection from the other host", LIMIT, || Ok(self.link_there()??))
    }

    /// The other host is refused with the name of who has the volume.
    fn refused_there(&self, holder: &str) -> Result<()> {
        refused(self.link_there()?, holder)
    }

    fn attached(&self) -> Result<Option<String>> {
        let status = self.cluster.volume_status()?;
        let attached = status.more.get("attached").context("status without `attached`")?;
        Ok(attached.as_str().map(str::to_owned))
    }

    fn cli(&self, args: &[&str]) -> Result<()> {
        let primary = self.primary()?;
        self.cluster.cli(&primary, args)?.ok().map(drop)
    }
}

fn refused(tried: Result<Link, LinkError>, holder: &str) -> Result<()> {
    match tried {
        Err(LinkError::NotPrimary(text)) => {
            ensure!(
                text.contains(&format!("attached by {holder}")),
                "the refusal does not name {holder}: {text}"
            );
            ensure!(text.contains(&format!("blkrepl detach vol0 --client {holder}")), "no way out: {text}");
            Ok(())
        }
        Err(other) => bail!("refused in another way: {other}"),
        Ok(_) => bail!("another host was let in while {holder} is attached"),
    }
}

/// The connection is closed: nothing more is answered.
fn assert_closed(mut link: Link) -> Result<()> {
    ensure!(link.write(0, &[9; 512]).is_err(), "a connection that was ended still serves");
    Ok(())
}

#[test]
fn one_host_at_a_time_across_moves_and_failovers_until_it_ends_or_is_detached() {
    let name = "attachments";
    if let Some(reason) = netns::unavailable() {
        return skipped(name, &reason);
    }
    let there = std::cell::Cell::new(None);
    scenario(
        name,
        || {
            let (host, cluster) = hosts()?;
            there.set(Some(host));
            Ok(cluster)
        },
        |cluster| {
            cluster.start_all()?;
            let there = there.take().context("the other host")?;
            let mut hosts = Hosts { cluster, there };
            follows_its_client(&mut hosts)?;
            ends_by_its_end_and_by_an_operator(&hosts)?;
            shared(&hosts)?;
            hosts.cluster.wait_in_sync(SYNC_LIMIT)?;
            hosts.cluster.compare_replicas()
        },
    );
}

fn follows_its_client(hosts: &mut Hosts<'_>) -> Result<()> {
    ensure!(hosts.attached()?.is_none(), "attached before anybody came");
    let mut first = hosts.link_here()?;
    let mut second = hosts.link_here().context("a second connection of one host")?;
    first.write(0, &[1; 4096])?;
    second.write(4096, &[2; 4096])?;
    ensure!(hosts.attached()?.as_deref() == Some(HERE), "attached: {:?}", hosts.attached()?);
    hosts.refused_there(HERE)?;
    // A client on a node's own machine is another host, too.
    let primary = hosts.primary()?;
    refused(Link::connect(hosts.cluster.node(&primary)?.unix()?, LIMIT), HERE)?;
    drop(second);
    hosts.refused_there(HERE)?;

    let to = hosts.cluster.secondary()?;
    hosts.cli(&["move", "vol0", "--to", &to])?;
    hosts.refused_there(HERE).context("after a move")?;
    assert_closed(first)?;
    let mut first = hosts.link_here()?;
    first.write(8192, &[3; 4096])?;

    let dead = hosts.primary()?;
    hosts.cluster.kill(&dead)?;
    let refusal = || match hosts.link_there()? {
        Err(LinkError::NotPrimary(text)) if text.contains("attached by") => Ok(text),
        Err(other) => bail!("not served yet: {other}"),
        Ok(_) => Ok("let in".to_owned()),
    };
    let text = wait_for("the next primary", FAILOVER_LIMIT, refusal)?;
    ensure!(text.contains(&format!("attached by {HERE}")), "after a failover: {text}");
    drop(first);
    let mut first = hosts.link_here()?;
    ensure!(first.read(8192, 4096)? == [3; 4096], "what was written before the failover is lost");
    hosts.cluster.restart(&dead)?;
    hosts.cluster.wait_in_sync(SYNC_LIMIT)?;
    drop(first);
    Ok(())
}

fn ends_by_its_end_and_by_an_operator(hosts: &Hosts<'_>) -> Result<()> {
    // The last connection ended just now.
    let link = hosts.wait_link_there()?;
    ensure!(hosts.attached()?.as_deref() == Some(THERE), "attached: {:?}", hosts.attached()?);
    refused(Link::connect(&hosts.address()?, LIMIT), THERE)?;

    let asked = hosts.cluster.secondary()?;
    let wrong = hosts.cluster.cli(&asked, &["detach", "vol0", "--client", HERE])?;
    ensure!(
        wrong.code() == 1 && wrong.text().contains(THERE),
        "detaching who is not attached: {}",
        wrong.text()
    );
    hosts.cluster.cli(&asked, &["detach", "vol0", "--client", THERE])?.ok()?;
    assert_closed(link)?;
    // A client that lives and comes back at once does not take the volume from the one that is to have it.
    match hosts.link_there()? {
        Err(LinkError::NotPrimary(text)) if text.contains("detached from") => {}
        Err(other) => bail!("refused in another way: {other}"),
        Ok(_) => bail!("a client that was detached just now is let in"),
    }
    let mut link = hosts.link_here()?;
    link.write(12288, &[4; 4096])?;
    drop(link);
    drop(hosts.wait_link_there().context("after the pause")?);
    Ok(())
}

fn shared(hosts: &Hosts<'_>) -> Result<()> {
    hosts.cli(&["volume", "set", "vol0", "--sharing", "shared"])?;
    let (mut one, mut other) = (hosts.link_here()?, hosts.link_there()??);
    one.write(16384, &[5; 4096])?;
    other.write(20480, &[6; 4096])?;
    ensure!(hosts.attached()?.is_none(), "a shared volume is attached to {:?}", hosts.attached()?);
    hosts.cli(&["volume", "set", "vol0", "--sharing", "exclusive"])?;
    assert_closed(one)?;
    assert_closed(other)?;
    let _link = hosts.link_here()?;
    hosts.refused_there(HERE)
}
