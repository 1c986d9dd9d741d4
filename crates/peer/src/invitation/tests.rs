//! An invitation's life, on a clock of the test's own.

use super::*;
use proptest::prelude::*;

const MADE: u64 = 1_800_000_000;
const MINUTE: Duration = Duration::from_secs(60);

fn us() -> Inviting {
    Inviting {
        key: KeyId::of_public_key(&[1]),
        name: "oslo".parse().unwrap(),
        addresses: vec!["192.0.2.1:7420".parse().unwrap()],
    }
}

fn offer() -> Offer {
    Offer {
        lifetime: MINUTE,
        called: None,
        may: Rights::ALL,
    }
}

fn store() -> (tempfile::TempDir, Invitations) {
    let folder = tempfile::tempdir().unwrap();
    let store = Invitations::at(folder.path().join(INVITATIONS_FILE));
    (folder, store)
}

fn guest(token: &Token, n: u8) -> Joining {
    Joining {
        id: token.id,
        key: KeyId::of_public_key(&[n]),
        knows_us: false,
    }
}

/// Comes with the token's own secret, or with a wrong one.
fn comes(
    store: &Invitations,
    now: u64,
    who: &Joining,
    right: bool,
) -> Result<(PeerName, Rights), JoinRefusal> {
    let name = |_: &Invitation| Ok("bern".parse().unwrap());
    store.redeem(now, who, |_| right, name).unwrap()
}

#[test]
fn an_invitation_is_good_for_one_host_and_one_time_and_outlives_its_store() {
    let (folder, store) = store();
    let (_, token) = store.make(MADE, us(), offer()).unwrap();
    let again = Invitations::at(folder.path().join(INVITATIONS_FILE));
    let who = guest(&token, 7);
    assert_eq!(
        comes(&again, MADE + 1, &who, true).unwrap().0.as_str(),
        "bern"
    );
    let other = guest(&token, 8);
    assert_eq!(
        comes(&again, MADE + 2, &other, true),
        Err(JoinRefusal::Used)
    );
    let knows_us = Joining {
        knows_us: true,
        ..guest(&token, 7)
    };
    assert_eq!(
        comes(&again, MADE + 2, &knows_us, true),
        Err(JoinRefusal::Used)
    );
    // Its answer was lost: it may ask again, but not for ever.
    assert!(comes(&again, MADE + 2, &who, true).is_ok());
    assert_eq!(comes(&again, MADE + 60, &who, true), Err(JoinRefusal::Used));
}

#[test]
fn the_file_holds_no_secret_and_is_its_owners_alone() {
    use std::os::unix::fs::PermissionsExt;
    let (folder, store) = store();
    let (_, token) = store.make(MADE, us(), offer()).unwrap();
    let path = folder.path().join(INVITATIONS_FILE);
    let text = std::fs::read_to_string(&path).unwrap();
    let secret = data_encoding::HEXLOWER.encode(&token.secret.0);
    assert!(
        text.contains(&token.id.to_string()) && !text.contains(&secret),
        "{text}"
    );
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o660)).unwrap();
    assert!(matches!(store.list(), Err(PeerError::PeersExposed { .. })));
}

#[test]
fn an_expired_or_cancelled_invitation_says_so_to_its_holder_only() {
    let (_folder, store) = store();
    let (_, late) = store.make(MADE, us(), offer()).unwrap();
    let (_, taken_back) = store.make(MADE, us(), offer()).unwrap();
    store.cancel(MADE, taken_back.id).unwrap();
    let expired = comes(&store, MADE + 70, &guest(&late, 7), true);
    assert_eq!(expired, Err(JoinRefusal::Expired { seconds: 10 }));
    let cancelled = comes(&store, MADE + 1, &guest(&taken_back, 7), true);
    assert_eq!(cancelled, Err(JoinRefusal::Cancelled));
    for token in [&late, &taken_back] {
        let stranger = comes(&store, MADE + 70, &guest(token, 7), false);
        assert!(matches!(stranger, Err(JoinRefusal::Wrong { .. })));
    }
}

#[test]
fn guessing_makes_an_invitation_void() {
    let (_folder, store) = store();
    let (_, token) = store.make(MADE, us(), offer()).unwrap();
    let who = guest(&token, 7);
    for left in (0..MAX_WRONG).rev() {
        let wrong = comes(&store, MADE, &who, false);
        assert_eq!(wrong, Err(JoinRefusal::Wrong { left }));
    }
    assert_eq!(comes(&store, MADE, &who, false), Err(JoinRefusal::Void));
    assert_eq!(comes(&store, MADE, &who, true), Err(JoinRefusal::Void));
}

#[test]
fn a_name_that_is_refused_leaves_the_invitation_good() {
    let (_folder, store) = store();
    let (_, token) = store.make(MADE, us(), offer()).unwrap();
    let who = guest(&token, 7);
    let taken = || JoinRefusal::NameTaken {
        name: "bern".parse().unwrap(),
    };
    let refused = store
        .redeem(MADE, &who, |_| true, |_| Err(taken()))
        .unwrap();
    assert_eq!(refused, Err(taken()));
    assert!(comes(&store, MADE, &who, true).is_ok());
}

#[test]
fn invitations_are_bounded_and_swept() {
    let (_folder, store) = store();
    let full = |now| {
        for _ in 0..MAX_OPEN {
            store.make(now, us(), offer()).unwrap();
        }
        let error = store.make(now, us(), offer()).unwrap_err();
        assert!(matches!(error, PeerError::TooManyInvitations { .. }));
    };
    for n in 0..6 {
        full(MADE + n * 60);
    }
    assert_eq!(store.list().unwrap().len(), MAX_KEPT);
    store.make(MADE + 3 * KEPT_FOR, us(), offer()).unwrap();
    assert_eq!(store.list().unwrap().len(), 1);
}

#[test]
fn what_makes_no_sense_is_refused_before_anything_is_written() {
    let (folder, store) = store();
    for lifetime in [Duration::ZERO, LIFETIMES.1 + MINUTE] {
        let offer = Offer {
            lifetime,
            ..offer()
        };
        let error = store.make(MADE, us(), offer).unwrap_err();
        assert!(matches!(error, PeerError::InvitationLifetime { .. }));
    }
    let nowhere = Inviting {
        addresses: vec![],
        ..us()
    };
    let error = store.make(MADE, nowhere, offer()).unwrap_err();
    assert!(matches!(error, PeerError::NoOwnAddress));
    let error = store.cancel(MADE, InvitationId([0; 8])).unwrap_err();
    assert!(matches!(error, PeerError::InvitationUnknown { .. }));
    let path = folder.path().join(INVITATIONS_FILE);
    assert!(!path.exists());
    std::fs::write(&path, "[invitation]").unwrap();
    let error = store.make(MADE, us(), offer()).unwrap_err();
    assert!(matches!(error, PeerError::InvitationsSyntax { .. }));
}

/// What happens to an invitation.
#[derive(Clone, Debug)]
enum Step {
    Comes {
        guest: u8,
        right: bool,
        knows_us: bool,
    },
    Cancel,
    Wait(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..3_u8, prop::bool::weighted(0.6), any::<bool>())
            .prop_map(|(guest, right, knows_us)| Step::Comes { guest, right, knows_us }),
        1 => Just(Step::Cancel),
        2 => (0..40_u64).prop_map(Step::Wait),
    ]
}

proptest! {
    /// Whatever happens: at most one host ever gets in, only with the secret, never after the end of its
    /// time, nor after the operator took it back, nor after too many guesses.
    #[test]
    fn at_most_one_host_gets_in(steps in prop::collection::vec(step(), 1..20)) {
        let (_folder, store) = store();
        let (_, token) = store.make(MADE, us(), offer()).unwrap();
        let (mut now, mut inside, mut wrong, mut cancelled) = (MADE, None, 0, false);
        for step in steps {
            match step {
                Step::Wait(seconds) => now += seconds,
                Step::Cancel => cancelled |= store.cancel(now, token.id).is_ok(),
                Step::Comes { guest: n, right, knows_us } => {
                    let who = Joining { knows_us, ..guest(&token, n) };
                    let told = comes(&store, now, &who, right);
                    if told.is_ok() {
                        prop_assert!(right && wrong < MAX_WRONG && now < MADE + 60 && !cancelled);
                        prop_assert_eq!(*inside.get_or_insert(n), n);
                    }
                    if let Err(JoinRefusal::Wrong { .. }) = told {
                        wrong += 1;
                        prop_assert!(!right && wrong <= MAX_WRONG);
                    }
                }
            }
        }
    }
}
