//! Which volumes somebody works on.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::state::Name;

/// The volumes that are taken. As many as there are volumes at most.
#[derive(Clone, Default)]
pub struct Claims(Arc<Mutex<BTreeSet<Name>>>);

/// A volume taken; it is free again when this goes.
pub struct Claim {
    claims: Claims,
    name: Name,
}

impl Claims {
    fn taken(&self) -> MutexGuard<'_, BTreeSet<Name>> {
        self.0.lock().expect("no holder of this lock panics")
    }

    /// `None` if it is taken.
    pub fn take(&self, name: &Name) -> Option<Claim> {
        self.taken().insert(name.clone()).then(|| Claim {
            claims: self.clone(),
            name: name.clone(),
        })
    }

    pub fn is_taken(&self, name: &Name) -> bool {
        self.taken().contains(name)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.claims.taken().remove(&self.name);
    }
}
