//! `peers.toml`: the hosts this one trusts, by name.
//!
//! ```toml
//! [rotterdam]
//! key = "whk1-…"
//! addresses = ["192.0.2.7:7420", "[2001:db8::7]:7420"]
//! may = ["send"]                 # left out: all, see `rights`
//! ```
//!
//! A name is this host's own word for a peer. One key has one name.
//! The file is rewritten whole by every change (comments are not kept), under a lock, from what the
//! file says at that moment, so the daemon and a command may both change it. The daemon goes by the
//! copy in memory, which [`TrustStore::reload`] brings up to date.
//!
//! A peer that is removed is cut off at once: the connections it has are shut down ([`ties`](crate::ties)),
//! also when it was removed in the file by somebody else and the store is told so by a reload.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use serde::{Deserialize, Serialize};

use crate::error::PeerError;
use crate::key_id::KeyId;
use crate::owned_file;
use crate::rights::Rights;
use crate::ties::{Tie, Ties};

/// The file's usual name in the state folder.
pub const PEERS_FILE: &str = "peers.toml";

/// The most peers a host has; at the bound no more are added.
pub const MAX_PEERS: usize = 1024;

/// The most addresses a peer has; at the bound the peer is refused.
pub const MAX_ADDRESSES: usize = 16;

const HEADING: &str =
    "# The hosts that this host trusts. Rewritten by whimbrel: comments are not kept.\n\n";

/// A peer's name: 1 to 63 of `a-z 0-9 - _ .`, a letter or digit at both ends.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PeerName(Arc<str>);

/// What is wrong with a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameFault {
    /// No characters, or more than 63.
    #[error("a name has 1 to 63 characters, this one {found}")]
    Length {
        /// Characters found.
        found: usize,
    },
    /// A character that names do not have.
    #[error("a name has no {found:?}, only a-z, 0-9, '-', '_' and '.'")]
    Character {
        /// The first such character.
        found: char,
    },
    /// Punctuation at an end.
    #[error("a name begins and ends with a letter or a digit")]
    Ends,
}

impl PeerName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for PeerName {
    type Err = PeerError;

    fn from_str(text: &str) -> Result<PeerName, PeerError> {
        let fault = |fault| PeerError::PeerName {
            name: text.chars().take(80).collect(),
            fault,
        };
        let found = text.chars().count();
        if !(1..=63).contains(&found) {
            return Err(fault(NameFault::Length { found }));
        }
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        if let Some(found) = text.chars().find(|&c| !plain(c) && !"-_.".contains(c)) {
            return Err(fault(NameFault::Character { found }));
        }
        if !text.starts_with(plain) || !text.ends_with(plain) {
            return Err(fault(NameFault::Ends));
        }
        Ok(PeerName(text.into()))
    }
}

impl TryFrom<String> for PeerName {
    type Error = PeerError;

    fn try_from(text: String) -> Result<PeerName, PeerError> {
        text.parse()
    }
}

impl From<PeerName> for String {
    fn from(name: PeerName) -> String {
        name.0.as_ref().to_owned()
    }
}

impl fmt::Display for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.0, f)
    }
}

/// Where a peer listens: `host:port`, the host being a name, an IPv4 address or an IPv6 address in
/// brackets.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PeerAddress(Arc<str>);

/// What is wrong with an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressFault {
    /// No `:port` at the end, or port 0.
    #[error("it ends with ':' and a port from 1 to 65535, as in host:7420")]
    Port,
    /// Nothing before the port, or what no host is called.
    #[error("before the port stands a host name, an IPv4 address, or an IPv6 address in brackets")]
    Host,
}

impl PeerAddress {
    /// The address as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for PeerAddress {
    type Err = PeerError;

    fn from_str(text: &str) -> Result<PeerAddress, PeerError> {
        let fault = |fault| PeerError::PeerAddress {
            address: text.chars().take(300).collect(),
            fault,
        };
        let (host, port) = text.rsplit_once(':').ok_or(fault(AddressFault::Port))?;
        let digits = port.bytes().all(|b| b.is_ascii_digit());
        if !digits || port.parse::<u16>().unwrap_or(0) == 0 {
            return Err(fault(AddressFault::Port));
        }
        let bracketed = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
        let plausible = match bracketed {
            Some(v6) => v6.parse::<std::net::Ipv6Addr>().is_ok(),
            None => {
                (1..=253).contains(&host.len())
                    && host
                        .bytes()
                        .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
            }
        };
        if !plausible {
            return Err(fault(AddressFault::Host));
        }
        Ok(PeerAddress(text.into()))
    }
}

impl From<std::net::SocketAddr> for PeerAddress {
    fn from(addr: std::net::SocketAddr) -> PeerAddress {
        PeerAddress(addr.to_string().into())
    }
}

impl TryFrom<String> for PeerAddress {
    type Error = PeerError;

    fn try_from(text: String) -> Result<PeerAddress, PeerError> {
        text.parse()
    }
}

impl From<PeerAddress> for String {
    fn from(address: PeerAddress) -> String {
        address.0.as_ref().to_owned()
    }
}

impl fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.0, f)
    }
}

/// What is known of a trusted host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    /// The fingerprint of its key.
    pub key: KeyId,
    /// Where it listens, best first. None where the peer always comes to this host.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<PeerAddress>,
    /// What it may do.
    #[serde(default, skip_serializing_if = "Rights::are_all")]
    pub may: Rights,
}

type Peers = BTreeMap<PeerName, Peer>;

/// The trusted hosts. Clones are the same store.
#[derive(Clone, Debug)]
pub struct TrustStore {
    path: Arc<Path>,
    peers: Arc<RwLock<Peers>>,
    /// Held from reading the file to publishing what it says: an older text never replaces a newer one.
    publishing: Arc<Mutex<()>>,
    ties: Ties,
}

impl TrustStore {
    /// Reads the store at `path`; where there is no file nobody is trusted.
    pub fn load(path: impl Into<PathBuf>) -> Result<TrustStore, PeerError> {
        let path: Arc<Path> = path.into().into();
        let peers = read(&path)?;
        Ok(TrustStore {
            path,
            peers: Arc::new(RwLock::new(peers)),
            publishing: Arc::default(),
            ties: Ties::default(),
        })
    }

    /// Takes in what others have changed in the file. On an error the store stays as it was.
    pub fn reload(&self) -> Result<(), PeerError> {
        let _publishing = self
            .publishing
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let peers = read(&self.path)?;
        self.publish(peers);
        Ok(())
    }

    /// Trusts a host.
    pub fn add(&self, name: PeerName, peer: Peer) -> Result<(), PeerError> {
        self.change(|peers| {
            if let Some(old) = peers.get(&name) {
                return Err(PeerError::PeerExists {
                    name: name.clone(),
                    key: old.key,
                });
            }
            peers.insert(name, peer);
            Ok(())
        })
    }

    /// Gives a trusted host other addresses.
    pub fn set_addresses(
        &self,
        name: &PeerName,
        addresses: Vec<PeerAddress>,
    ) -> Result<(), PeerError> {
        self.change(|peers| {
            let peer = peers.get_mut(name).ok_or_else(|| unknown(name))?;
            peer.addresses = addresses;
            Ok(())
        })
    }

    /// Changes what a trusted host may do.
    pub fn set_rights(&self, name: &PeerName, may: Rights) -> Result<(), PeerError> {
        self.change(|peers| {
            let peer = peers.get_mut(name).ok_or_else(|| unknown(name))?;
            peer.may = may;
            Ok(())
        })
    }

    /// Trusts the host with this key under this name, or, if it is known by it already, gives it these
    /// addresses and rights. A host that is known by another name keeps that; the name is the result.
    pub fn admit(&self, name: PeerName, peer: Peer) -> Result<PeerName, PeerError> {
        self.change(|peers| {
            let known = peers.iter_mut().find(|(_, known)| known.key == peer.key);
            if let Some((name, known)) = known {
                *known = peer;
                return Ok(name.clone());
            }
            if let Some(old) = peers.get(&name) {
                return Err(PeerError::PeerExists { key: old.key, name });
            }
            peers.insert(name.clone(), peer);
            Ok(name)
        })
    }

    /// Trusts a host no more, cuts the connections it has, and returns what was known of it.
    pub fn remove(&self, name: &PeerName) -> Result<Peer, PeerError> {
        self.change(|peers| peers.remove(name).ok_or_else(|| unknown(name)))
    }

    /// Calls a trusted host by another name.
    pub fn rename(&self, old: &PeerName, new: PeerName) -> Result<(), PeerError> {
        self.change(|peers| {
            if let Some(there) = peers.get(&new).filter(|_| *old != new) {
                return Err(PeerError::PeerExists {
                    key: there.key,
                    name: new,
                });
            }
            let peer = peers.remove(old).ok_or_else(|| unknown(old))?;
            peers.insert(new, peer);
            Ok(())
        })
    }

    /// What is known of the host called `name`.
    pub fn get(&self, name: &PeerName) -> Result<Peer, PeerError> {
        self.with(|peers| peers.get(name).cloned())
            .ok_or_else(|| unknown(name))
    }

    /// The name of the host with this key, if it is trusted.
    pub fn name_of(&self, key: &KeyId) -> Option<PeerName> {
        self.with(|peers| {
            let (name, _) = peers.iter().find(|(_, peer)| peer.key == *key)?;
            Some(name.clone())
        })
    }

    /// All trusted hosts, by name.
    pub fn list(&self) -> Vec<(PeerName, Peer)> {
        self.with(|peers| {
            peers
                .iter()
                .map(|(name, peer)| (name.clone(), peer.clone()))
                .collect()
        })
    }

    /// What is known of the host with this key, and its name, if it is trusted.
    pub fn find(&self, key: &KeyId) -> Option<(PeerName, Peer)> {
        self.with(|peers| {
            let (name, peer) = peers.iter().find(|(_, peer)| peer.key == *key)?;
            Some((name.clone(), peer.clone()))
        })
    }

    /// Ties a connection to its peer's being trusted; `None` if it is not, by now.
    pub(crate) fn tie(&self, key: KeyId, socket: impl AsFd) -> io::Result<Option<Tie>> {
        let is_trusted = || self.name_of(&key).is_some();
        self.ties.tie(key, socket, is_trusted)
    }

    // The map is only ever replaced whole, so a poisoned lock still guards a whole map.
    fn with<T>(&self, f: impl FnOnce(&Peers) -> T) -> T {
        f(&self.peers.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn publish(&self, peers: Peers) {
        *self.peers.write().unwrap_or_else(PoisonError::into_inner) = peers;
        self.ties.cut(|key| self.name_of(key).is_some());
    }

    fn change<T>(
        &self,
        f: impl FnOnce(&mut Peers) -> Result<T, PeerError>,
    ) -> Result<T, PeerError> {
        let _publishing = self
            .publishing
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let _lock = owned_file::lock(&self.path)?;
        let mut peers = read(&self.path)?;
        let result = f(&mut peers)?;
        check(&peers)?;
        write(&self.path, &peers)?;
        self.publish(peers);
        Ok(result)
    }
}

fn unknown(name: &PeerName) -> PeerError {
    PeerError::PeerUnknown { name: name.clone() }
}

fn check(peers: &Peers) -> Result<(), PeerError> {
    if peers.len() > MAX_PEERS {
        return Err(PeerError::TooManyPeers {
            found: peers.len(),
            most: MAX_PEERS,
        });
    }
    let mut keys = BTreeMap::new();
    for (name, peer) in peers {
        if peer.addresses.len() > MAX_ADDRESSES {
            return Err(PeerError::TooManyAddresses {
                name: name.clone(),
                found: peer.addresses.len(),
                most: MAX_ADDRESSES,
            });
        }
        if let Some(first) = keys.insert(peer.key, name) {
            return Err(PeerError::KeyTrusted {
                key: peer.key,
                name: first.clone(),
            });
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<Peers, PeerError> {
    let Some(text) = owned_file::read(path)? else {
        return Ok(Peers::new());
    };
    let peers = toml::from_str(&text).map_err(|source| PeerError::PeersSyntax {
        path: path.to_owned(),
        source: Box::new(source),
    })?;
    check(&peers)?;
    Ok(peers)
}

fn write(path: &Path, peers: &Peers) -> Result<(), PeerError> {
    let text = toml::to_string(peers)
        .expect("a map of names to a fingerprint and strings has a form in TOML");
    owned_file::write(path, &(HEADING.to_owned() + &text), 0o644)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name(text: &str) -> PeerName {
        text.parse().unwrap()
    }

    fn peer(n: u8) -> Peer {
        Peer {
            key: KeyId::of_public_key(&[n]),
            addresses: vec!["192.0.2.1:7420".parse().unwrap()],
            may: Rights::ALL,
        }
    }

    fn store() -> (tempfile::TempDir, TrustStore) {
        let folder = tempfile::tempdir().unwrap();
        let store = TrustStore::load(folder.path().join(PEERS_FILE)).unwrap();
        (folder, store)
    }

    #[test]
    fn changes_are_there_after_a_restart() {
        let (folder, store) = store();
        store.add(name("lisbon"), peer(1)).unwrap();
        store.add(name("oslo"), peer(2)).unwrap();
        store.rename(&name("lisbon"), name("porto")).unwrap();
        store.remove(&name("oslo")).unwrap();
        store.add(name("bern"), peer(3)).unwrap();
        store.set_addresses(&name("bern"), vec![]).unwrap();
        let may = Rights {
            send: true,
            receive: false,
        };
        store.set_rights(&name("bern"), may).unwrap();
        let again = TrustStore::load(folder.path().join(PEERS_FILE)).unwrap();
        assert_eq!(again.list(), store.list());
        assert_eq!(again.get(&name("porto")).unwrap(), peer(1));
        assert_eq!(again.name_of(&peer(3).key), Some(name("bern")));
        assert_eq!(again.name_of(&peer(2).key), None);
        assert_eq!(again.get(&name("bern")).unwrap().may, may);
    }

    #[test]
    fn an_entry_from_before_there_were_rights_has_them_all() {
        let (folder, store) = store();
        let key = peer(1).key;
        let text = format!(
            "[a]\nkey = \"{key}\"\n[b]\nkey = \"{}\"\nmay = []\n",
            peer(2).key
        );
        std::fs::write(folder.path().join(PEERS_FILE), text).unwrap();
        store.reload().unwrap();
        assert_eq!(store.get(&name("a")).unwrap().may, Rights::ALL);
        assert_eq!(store.get(&name("b")).unwrap().may.to_string(), "nothing");
    }

    #[test]
    fn a_host_that_is_admitted_keeps_the_name_it_has() {
        let (_folder, store) = store();
        assert_eq!(
            store.admit(name("lisbon"), peer(1)).unwrap(),
            name("lisbon")
        );
        let mut moved = peer(1);
        moved.addresses = vec![];
        assert_eq!(
            store.admit(name("porto"), moved.clone()).unwrap(),
            name("lisbon")
        );
        assert_eq!(store.find(&moved.key), Some((name("lisbon"), moved)));
        let taken = store.admit(name("lisbon"), peer(2)).unwrap_err();
        assert!(matches!(taken, PeerError::PeerExists { .. }), "{taken}");
    }

    #[test]
    fn two_stores_on_one_file_do_not_undo_each_other() {
        let (folder, store) = store();
        let other = TrustStore::load(folder.path().join(PEERS_FILE)).unwrap();
        store.add(name("lisbon"), peer(1)).unwrap();
        other.add(name("oslo"), peer(2)).unwrap();
        assert_eq!(other.list().len(), 2);
        assert_eq!(store.list().len(), 1);
        store.reload().unwrap();
        assert_eq!(store.list(), other.list());
    }

    #[test]
    fn a_refused_change_changes_nothing() {
        let (_folder, store) = store();
        store.add(name("lisbon"), peer(1)).unwrap();
        store.add(name("oslo"), peer(2)).unwrap();
        let before = store.list();
        let errors = [
            store.add(name("lisbon"), peer(3)).unwrap_err(),
            store.add(name("bern"), peer(1)).unwrap_err(),
            store.rename(&name("lisbon"), name("oslo")).unwrap_err(),
            store.rename(&name("bern"), name("porto")).unwrap_err(),
            store.remove(&name("bern")).unwrap_err(),
            store
                .set_addresses(&name("oslo"), vec![peer(1).addresses[0].clone(); 17])
                .unwrap_err(),
        ];
        assert!(matches!(errors[0], PeerError::PeerExists { .. }));
        assert!(matches!(errors[1], PeerError::KeyTrusted { .. }));
        assert!(matches!(errors[2], PeerError::PeerExists { .. }));
        assert!(matches!(errors[3], PeerError::PeerUnknown { .. }));
        assert!(matches!(errors[4], PeerError::PeerUnknown { .. }));
        assert!(matches!(errors[5], PeerError::TooManyAddresses { .. }));
        assert_eq!(store.list(), before);
        store.reload().unwrap();
        assert_eq!(store.list(), before);
    }

    #[test]
    fn a_broken_file_is_an_error_and_not_an_empty_store() {
        let (folder, store) = store();
        store.add(name("lisbon"), peer(1)).unwrap();
        let path = folder.path().join(PEERS_FILE);
        let key = peer(1).key;
        let broken = [
            "[lisbon".to_owned(),
            "[lisbon]\nkey = \"whk1-abc\"".to_owned(),
            format!("[Lisbon]\nkey = \"{key}\""),
            format!("[lisbon]\nkey = \"{key}\"\nadresses = []"),
            format!("[lisbon]\nkey = \"{key}\"\naddresses = [\"nowhere\"]"),
        ];
        for text in broken {
            std::fs::write(&path, &text).unwrap();
            let error = store.reload().unwrap_err();
            assert!(matches!(error, PeerError::PeersSyntax { .. }), "{error}");
            assert_eq!(store.list().len(), 1);
        }
        let twice = format!("[a]\nkey = \"{key}\"\n[b]\nkey = \"{key}\"");
        std::fs::write(&path, twice).unwrap();
        let error = store.reload().unwrap_err();
        assert!(matches!(error, PeerError::KeyTrusted { .. }), "{error}");
    }

    #[test]
    fn a_file_that_others_may_write_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let (folder, store) = store();
        store.add(name("lisbon"), peer(1)).unwrap();
        let path = folder.path().join(PEERS_FILE);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o664)).unwrap();
        let error = store.reload().unwrap_err();
        assert!(matches!(error, PeerError::PeersExposed { .. }), "{error}");
    }

    #[test]
    fn names_and_addresses_say_what_is_wrong_with_them() {
        for bad in ["", "a b", "Ä", "-a", "a.", "a/b", "UP", &"x".repeat(64)] {
            let error = bad.parse::<PeerName>().unwrap_err();
            assert!(matches!(error, PeerError::PeerName { .. }), "{error}");
        }
        for bad in [
            "",
            "host",
            "host:",
            "host:0",
            "host:65536",
            "host:+1",
            ":7420",
            "a b:1",
            "::1:7420",
            "[::1]",
            "[x]:1",
        ] {
            let error = bad.parse::<PeerAddress>().unwrap_err();
            assert!(matches!(error, PeerError::PeerAddress { .. }), "{error}");
        }
        for good in [
            "192.0.2.1:7420",
            "[2001:db8::1]:1",
            "host-1.example.org:65535",
        ] {
            assert_eq!(good.parse::<PeerAddress>().unwrap().as_str(), good);
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_name_and_an_address_or_a_fault(text in "\\PC*") {
            let _ = text.parse::<PeerName>();
            let _ = text.parse::<PeerAddress>();
        }

        #[test]
        fn every_valid_name_survives_the_file(text in "[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?") {
            let peers = Peers::from([(name(&text), peer(1))]);
            let written = toml::to_string(&peers).unwrap();
            prop_assert_eq!(toml::from_str::<Peers>(&written).unwrap(), peers);
        }
    }
}
