//! Two hosts, a client and a wide area on one machine.
//!
//! Everything of a lab lives in three network namespaces of its own, so labs do not meet each other nor
//! the machine's network, and deleting the three deletes everything. See the crate's page for the picture.

mod interrupt;
mod ip;
mod namespace;
mod sweep;

use std::fmt;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

pub use namespace::Namespace;

use crate::LabError;
use crate::process::Process;
use crate::wan::{Tun, Wan, WanSpec};
use sweep::Names;

/// The device of the wide area in each host.
pub const WAN_DEVICE: &str = "wan0";

/// The guests' bridge in each host, and the client's.
pub const BRIDGE: &str = "br0";

/// The client's address on the guests' LAN, a /24.
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 1);

/// Bytes of an IP packet, on the WAN and on the LAN.
pub const MTU: u32 = 1500;

/// Packets the kernel keeps while the emulator's thread is not looking; beyond, the kernel drops.
/// 120 ms of 1500-byte packets at 1 Gbit/s.
const DEVICE_QUEUE: u32 = 10_000;

/// Largest TCP buffer of a connection between hosts: twice the product of 1 Gbit/s and 300 ms.
const TCP_BUFFERS: &str = "4096 131072 75000000";

/// How long the kernel may take to find a device of ours up.
const UP_WITHIN: Duration = Duration::from_secs(60);

/// One of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Host {
    A,
    B,
}

impl Host {
    pub const BOTH: [Host; 2] = [Host::A, Host::B];

    /// Its address on the wide area.
    pub fn wan_address(self) -> Ipv4Addr {
        match self {
            Host::A => Ipv4Addr::new(10, 77, 0, 1),
            Host::B => Ipv4Addr::new(10, 77, 0, 2),
        }
    }

    pub fn other(self) -> Host {
        match self {
            Host::A => Host::B,
            Host::B => Host::A,
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Host::A => "host-a",
            Host::B => "host-b",
        })
    }
}

/// Where something runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    Host(Host),
    Client,
}

impl From<Host> for Place {
    fn from(host: Host) -> Place {
        Place::Host(host)
    }
}

/// The guest's `index`-th address on the LAN: 192.168.77.10 and up; indices from 245 repeat.
pub fn guest_address(index: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 77, 10 + index % 245)
}

/// What a lab is to be like.
#[derive(Clone, Debug, PartialEq)]
pub struct LabSpec {
    pub wan: WanSpec,
    /// TCP congestion control of both hosts (`cubic`, `bbr`); `None`: the machine's default.
    pub congestion: Option<String>,
}

impl LabSpec {
    pub fn new(wan: WanSpec) -> Self {
        LabSpec {
            wan,
            congestion: None,
        }
    }

    pub fn with_congestion(self, name: &str) -> Self {
        LabSpec {
            congestion: Some(name.to_owned()),
            ..self
        }
    }
}

/// A running lab. Dropping it, or SIGINT or SIGTERM to the process, kills whatever runs inside and takes
/// everything away; what a SIGKILL leaves is swept by the next lab of any process.
#[derive(Debug)]
pub struct Lab {
    // The order is that of dropping: the link before the namespaces.
    wan: Wan,
    host_a: Namespace,
    host_b: Namespace,
    client: Namespace,
    _claim: Claim,
}

/// Why this machine cannot carry a lab, if it cannot: tests skip with it.
pub fn available() -> Result<(), LabError> {
    let unavailable = |reason| Err(LabError::Unavailable { reason });
    if !rustix::process::geteuid().is_root() {
        return unavailable("it needs root, for network namespaces");
    }
    if !Path::new("/dev/net/tun").exists() {
        return unavailable("there is no /dev/net/tun");
    }
    Ok(())
}

impl Lab {
    /// Brings the lab up; what failed half-way is taken away again.
    pub fn new(spec: &LabSpec) -> Result<Lab, LabError> {
        available()?;
        spec.wan.validate()?;
        let names = Names::fresh();
        sweep::leftovers(&names);
        let claim = Claim::new(names);
        let [name_a, name_b, name_c] = claim.names.all();
        ip::batch(
            None,
            &claim.names.all().map(|name| format!("netns add {name}")),
        )?;
        let host_a = Namespace::open(name_a)?;
        let host_b = Namespace::open(name_b)?;
        let client = Namespace::open(name_c)?;
        for namespace in [&host_a, &host_b, &client] {
            settle(namespace)?;
        }
        ip::batch(Some(name_c), &client_lines(name_a, name_b))?;
        let raise_host = |namespace: &Namespace, host| {
            settle_tcp(namespace, spec.congestion.as_deref())?;
            let tun = namespace.run("wan device", || Tun::create(WAN_DEVICE))?;
            ip::batch(Some(namespace.name()), &host_lines(host))?;
            Ok::<Tun, LabError>(tun)
        };
        let tun_a = raise_host(&host_a, Host::A)?;
        let tun_b = raise_host(&host_b, Host::B)?;
        for namespace in [&host_a, &host_b] {
            // Not the bridge: it has no address here, and the kernel is in no hurry to call it up.
            await_devices(namespace, &["lan"])?;
        }
        await_devices(&client, &["host-a", "host-b", BRIDGE])?;
        // A neighbour that was away must be asked for again at once, not once a second.
        client.sysctl(&[("net/ipv4/neigh/br0/retrans_time_ms", "50")])?;
        let wan = Wan::start(tun_a, tun_b, spec.wan)?;
        Ok(Lab {
            wan,
            host_a,
            host_b,
            client,
            _claim: claim,
        })
    }

    /// The link between the hosts.
    pub fn wan(&self) -> &Wan {
        &self.wan
    }

    pub fn namespace(&self, place: impl Into<Place>) -> &Namespace {
        match place.into() {
            Place::Host(Host::A) => &self.host_a,
            Place::Host(Host::B) => &self.host_b,
            Place::Client => &self.client,
        }
    }

    /// Starts a process inside one of the places, its output appended to `log`.
    pub fn spawn_in(
        &self,
        place: impl Into<Place>,
        name: &str,
        mut command: Command,
        log: &Path,
    ) -> Result<Process, LabError> {
        self.namespace(place).enter(&mut command);
        Process::spawn(name, command, log)
    }

    /// Joins the hosts by a cable that the emulator has no part in: their addresses on the wide area move to it.
    /// To be done before anything listens there.
    pub fn bypass(&self) -> Result<(), LabError> {
        let [a, b] = [self.host_a.name(), self.host_b.name()];
        let cable = format!("link add direct type veth peer name direct netns {b}");
        ip::batch(Some(a), &[cable])?;
        for host in Host::BOTH {
            let address = host.wan_address();
            let lines = [
                format!("addr del {address}/24 dev {WAN_DEVICE}"),
                format!("addr add {address}/24 dev direct"),
                format!("link set direct mtu {MTU} up"),
            ];
            ip::batch(Some(self.namespace(host).name()), &lines)?;
        }
        for namespace in [&self.host_a, &self.host_b] {
            await_devices(namespace, &["direct"])?;
        }
        Ok(())
    }

    /// Makes a tap device `name` (at most 15 bytes) that stays, attached to the host's bridge: for
    /// `-netdev tap,ifname=NAME,script=no,downscript=no` of a QEMU that runs inside the host.
    pub fn tap(&self, host: Host, name: &str) -> Result<(), LabError> {
        interface_name(name)?;
        ip::batch(
            Some(self.namespace(host).name()),
            &[
                format!("tuntap add dev {name} mode tap"),
                format!("link set dev {name} mtu {MTU} master {BRIDGE} up"),
            ],
        )
    }

    /// Takes a tap device away again.
    pub fn remove_tap(&self, host: Host, name: &str) -> Result<(), LabError> {
        interface_name(name)?;
        let line = format!("link del dev {name}");
        ip::batch(Some(self.namespace(host).name()), &[line])
    }

    /// Tells the client a guest's hardware address for good. Without it a guest away for seconds
    /// is first asked for again by ARP, and the probe would measure that too.
    pub fn pin_neighbour(&self, address: Ipv4Addr, hardware: [u8; 6]) -> Result<(), LabError> {
        let hardware = hardware.map(|byte| format!("{byte:02x}")).join(":");
        let line = format!("neigh replace {address} lladdr {hardware} dev {BRIDGE} nud permanent");
        ip::batch(Some(self.client.name()), &[line])
    }
}

/// The right to the three names, and the duty to take them away.
#[derive(Debug)]
struct Claim {
    names: Names,
}

impl Claim {
    fn new(names: Names) -> Claim {
        interrupt::register(&names);
        Claim { names }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Err(error) = sweep::remove(&self.names.all()) {
            tracing::warn!(%error, "namespaces left behind; the next lab removes them");
        }
        interrupt::unregister(&self.names);
    }
}

/// No IPv6: its autoconfiguration sends packets nobody asked for over the measured link.
fn settle(namespace: &Namespace) -> Result<(), LabError> {
    namespace.sysctl(&[
        ("net/ipv6/conf/all/disable_ipv6", "1"),
        ("net/ipv6/conf/default/disable_ipv6", "1"),
    ])
}

fn settle_tcp(host: &Namespace, congestion: Option<&str>) -> Result<(), LabError> {
    host.sysctl(&[
        ("net/ipv4/tcp_rmem", TCP_BUFFERS),
        ("net/ipv4/tcp_wmem", TCP_BUFFERS),
        // A run must not start from what an earlier one learned of the link.
        ("net/ipv4/tcp_no_metrics_save", "1"),
    ])?;
    match congestion {
        Some(name) => host.sysctl(&[("net/ipv4/tcp_congestion_control", name)]),
        None => Ok(()),
    }
}

/// A bridge that forwards at once: no spanning tree, no listening phase.
fn bridge_lines() -> [String; 2] {
    [
        "link set lo up".to_owned(),
        format!("link add {BRIDGE} type bridge stp_state 0 forward_delay 0 mcast_snooping 0"),
    ]
}

fn client_lines(host_a: &str, host_b: &str) -> Vec<String> {
    let mut lines = bridge_lines().to_vec();
    lines.push(format!("addr add {CLIENT}/24 dev {BRIDGE}"));
    for (port, host) in [(Host::A, host_a), (Host::B, host_b)] {
        lines.push(format!(
            "link add {port} type veth peer name lan netns {host}"
        ));
        lines.push(format!("link set {port} mtu {MTU} master {BRIDGE} up"));
    }
    lines.push(format!("link set {BRIDGE} up"));
    lines
}

fn host_lines(host: Host) -> Vec<String> {
    let mut lines = bridge_lines().to_vec();
    lines.push(format!("link set lan mtu {MTU} master {BRIDGE} up"));
    lines.push(format!("link set {BRIDGE} up"));
    lines.push(format!(
        "addr add {}/24 dev {WAN_DEVICE}",
        host.wan_address()
    ));
    lines.push(format!(
        "link set {WAN_DEVICE} mtu {MTU} txqueuelen {DEVICE_QUEUE} up"
    ));
    lines
}

/// Waits until the devices carry traffic: a few milliseconds as a rule.
fn await_devices(namespace: &Namespace, devices: &[&'static str]) -> Result<(), LabError> {
    let deadline = Instant::now() + UP_WITHIN;
    loop {
        let up = ip::devices_up(namespace.name())?;
        let down = devices.iter().find(|&&name| up.iter().all(|up| up != name));
        let Some(&device) = down else {
            return Ok(());
        };
        if Instant::now() >= deadline {
            return Err(LabError::DeviceDown {
                namespace: namespace.name().to_owned(),
                device,
                after: UP_WITHIN,
            });
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Names go into a batch of commands: a space would be another argument.
fn interface_name(name: &str) -> Result<(), LabError> {
    let fits = (1..=15).contains(&name.len());
    if fits && !name.contains(|c: char| c == '/' || c.is_whitespace()) {
        return Ok(());
    }
    Err(LabError::InterfaceName {
        name: name.to_owned(),
    })
}
