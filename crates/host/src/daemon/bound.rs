//! The host at the other end of a migration: the key that the migration is bound to for its whole life.
//!
//! The key decides who may take part; the name is for people, and may be changed by `host rename` in the
//! midst of a move. Both are in the migration's folder: `peer-key`, `peer` (the name when it began).

use std::path::Path;

use whimbrel_peer::key_id::KeyId;
use whimbrel_peer::trust::{PeerName, TrustStore};

use super::take_up::named;
use crate::api::ApiError;
use crate::state::{StateDir, StateError};

const NAME: &str = "peer";
const KEY: &str = "peer-key";

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bound {
    pub name: PeerName,
    pub key: KeyId,
}

impl Bound {
    pub fn save(&self, folder: &Path) -> Result<(), StateError> {
        StateDir::replace_file(&folder.join(KEY), self.key.to_string().as_bytes())?;
        StateDir::replace_file(&folder.join(NAME), self.name.as_str().as_bytes())
    }

    /// Whom the migration in this folder is bound to, by the name it has today. A folder of a version that
    /// kept no key is bound to the key that the name has today.
    pub fn load(folder: &Path, trust: &TrustStore) -> Result<Bound, ApiError> {
        let name = named::<PeerName>(folder, NAME)?;
        if StateDir::read_text(&folder.join(KEY))?.is_none() {
            let key = trust.get(&name)?.key;
            return Ok(Bound { name, key });
        }
        let key = named::<KeyId>(folder, KEY)?;
        let name = trust.name_of(&key).unwrap_or(name);
        Ok(Bound { name, key })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use whimbrel_peer::rights::Rights;
    use whimbrel_peer::trust::Peer;

    fn name(text: &str) -> PeerName {
        text.parse().expect("a name")
    }

    fn trusting(folder: &Path, called: &str, key: KeyId) -> TrustStore {
        let trust = TrustStore::load(folder.join("peers.toml")).expect("fresh");
        let peer = Peer {
            key,
            addresses: Vec::new(),
            may: Rights::ALL,
        };
        trust.add(name(called), peer).expect("room");
        trust
    }

    #[test]
    fn a_migration_stays_bound_to_its_key_whatever_becomes_of_the_name() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let folder = folder.path();
        let (key, other) = (KeyId::of_public_key(&[1]), KeyId::of_public_key(&[2]));
        let trust = trusting(folder, "oslo", key);
        let bound = Bound {
            name: name("oslo"),
            key,
        };
        bound.save(folder).expect("room");
        assert_eq!(Bound::load(folder, &trust).expect("saved"), bound);
        trust.rename(&name("oslo"), name("bergen")).expect("free");
        let renamed = Bound::load(folder, &trust).expect("saved");
        assert_eq!((renamed.name, renamed.key), (name("bergen"), key));
        // The name is another host's now, and the host itself is trusted no more.
        trust.remove(&name("bergen")).expect("there");
        let peer = Peer {
            key: other,
            addresses: Vec::new(),
            may: Rights::ALL,
        };
        trust.add(name("oslo"), peer).expect("free");
        assert_eq!(Bound::load(folder, &trust).expect("saved").key, key);
    }

    #[test]
    fn a_folder_without_a_key_is_bound_by_its_name() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let folder = folder.path();
        let key = KeyId::of_public_key(&[1]);
        let trust = trusting(folder, "oslo", key);
        std::fs::write(folder.join(NAME), "oslo").expect("room");
        assert_eq!(Bound::load(folder, &trust).expect("named").key, key);
        trust.remove(&name("oslo")).expect("there");
        assert!(Bound::load(folder, &trust).is_err());
    }
}
