//! The state directory as a whole, and what becomes of it when its files are not what they should be.

use super::*;
use crate::api::{ApiError, TrustRequest};
use proptest::prelude::*;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use whimbrel_engine::switchover::Epoch;
use whimbrel_peer::PeerError;
use whimbrel_peer::trust::TrustStore;

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn state() -> (tempfile::TempDir, StateDir) {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::init(&dir.path().join("state")).unwrap();
    (dir, state)
}

fn add_volume(state: &StateDir, text: &str) -> VolumeRecord {
    let draft = state.begin_volume(&name(text)).unwrap();
    fs::write(draft.data_path(), [0; 4096]).unwrap();
    let record = VolumeRecord::fresh(name(text), 4096).unwrap();
    draft.commit(&record).unwrap();
    record
}

fn spec(text: &str) -> MachineSpec {
    toml::from_str(&format!(
        "name = \"{text}\"\nmemory = \"64MiB\"\n[[disk]]\nvolume = \"root\"\n"
    ))
    .unwrap()
}

/// Every error of the directory, as people get it.
fn told(error: StateError) -> ApiError {
    let error = ApiError::from(error);
    assert!(
        error.machine_state.is_some() && error.next_step.is_some(),
        "{error:?}"
    );
    error
}

#[test]
fn making_it_twice_is_making_it_once() {
    let (_dir, state) = state();
    let volume = add_volume(&state, "root");
    let again = StateDir::init(state.root()).unwrap();
    assert_eq!(again.volume(&volume.name).unwrap(), volume);
    assert_eq!(
        fs::metadata(state.root()).unwrap().permissions().mode() & 0o777,
        0o700
    );
}

#[test]
fn a_making_that_was_cut_off_is_finished() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("volumes")).unwrap();
    StateDir::init(dir.path()).unwrap();
    StateDir::open(dir.path()).unwrap();
}

#[test]
fn someone_elses_directory_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("thesis.txt"), "").unwrap();
    let error = told(StateDir::init(dir.path()).unwrap_err());
    assert!(error.what.contains("thesis.txt"), "{}", error.what);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn what_was_never_made_says_how_to_make_it() {
    let dir = tempfile::tempdir().unwrap();
    let error = told(StateDir::open(dir.path()).unwrap_err());
    assert!(
        error
            .next_step
            .unwrap()
            .contains("whimbrel host init --state")
    );
}

#[test]
fn a_newer_format_is_refused_in_words() {
    let (_dir, state) = state();
    fs::write(state.root().join("VERSION"), "2\n").unwrap();
    let error = StateDir::open(state.root()).unwrap_err();
    assert!(matches!(
        error,
        StateError::NewerFormat {
            found: 2,
            known: FORMAT,
            ..
        }
    ));
    assert!(told(error).next_step.unwrap().contains("later one"));
    assert!(StateDir::init(state.root()).is_err());
}

#[test]
fn a_damaged_version_is_not_taken_for_a_fresh_directory() {
    let (_dir, state) = state();
    for text in ["", "one", "-1", "0"] {
        fs::write(state.root().join("VERSION"), text).unwrap();
        assert!(
            matches!(
                StateDir::init(state.root()),
                Err(StateError::Damaged { .. })
            ),
            "{text:?}"
        );
    }
}

#[test]
fn two_daemons_never_share_it() {
    let (_dir, state) = state();
    let lock = state.lock().unwrap();
    let error = state.lock().unwrap_err();
    assert!(matches!(&error, StateError::Locked { pid: Some(p), .. } if *p == std::process::id()));
    assert!(
        told(error)
            .what
            .contains(&format!("process {}", std::process::id()))
    );
    drop(lock);
    state.lock().unwrap();
}

#[test]
fn what_a_crash_left_unfinished_is_swept() {
    let (_dir, state) = state();
    let draft = state.begin_volume(&name("half")).unwrap();
    fs::write(draft.data_path(), "half").unwrap();
    let left = draft.folder().to_path_buf();
    std::mem::forget(draft);
    assert!(state.volumes().unwrap().records.is_empty());
    assert!(state.volumes().unwrap().damaged.is_empty());
    state.lock().unwrap();
    assert!(!left.exists());
}

#[test]
fn a_draft_given_up_leaves_nothing() {
    let (_dir, state) = state();
    drop(state.begin_volume(&name("half")).unwrap());
    assert_eq!(
        fs::read_dir(state.root().join("volumes")).unwrap().count(),
        0
    );
}

#[test]
fn of_two_drafts_of_a_name_the_second_fails() {
    let (_dir, state) = state();
    let draft = state.begin_volume(&name("root")).unwrap();
    fs::write(draft.data_path(), [0; 512]).unwrap();
    let first = add_volume(&state, "root");
    let error = draft
        .commit(&VolumeRecord::fresh(name("root"), 512).unwrap())
        .unwrap_err();
    assert!(matches!(error, StateError::Exists { .. }), "{error}");
    assert_eq!(state.volume(&name("root")).unwrap(), first);
    assert!(matches!(
        state.begin_volume(&name("root")),
        Err(StateError::Exists { .. })
    ));
}

#[test]
fn a_volume_keeps_what_was_recorded() {
    let (_dir, state) = state();
    let mut record = add_volume(&state, "root");
    record.epoch = Epoch(7);
    record.machine = Some(name("web1"));
    record.state = Ownership::Departed {
        migration: "m-1".parse().unwrap(),
        to: "b".parse().unwrap(),
    };
    state.save_volume(&record).unwrap();
    assert_eq!(
        StateDir::open(state.root())
            .unwrap()
            .volume(&name("root"))
            .unwrap(),
        record
    );
    state.remove_volume(&name("root")).unwrap();
    assert!(matches!(
        state.volume(&name("root")),
        Err(StateError::NoSuch { .. })
    ));
    assert!(matches!(
        state.save_volume(&record),
        Err(StateError::NoSuch { .. })
    ));
}

#[test]
fn a_machine_has_both_its_records_or_none() {
    let (_dir, state) = state();
    let mut runtime = MachineRuntime::fresh();
    state.add_machine(&spec("web1"), &runtime).unwrap();
    assert!(matches!(
        state.add_machine(&spec("web1"), &runtime),
        Err(StateError::Exists { .. })
    ));
    runtime.epoch = Epoch(9);
    runtime.process = Some(QemuProcess {
        pid: 7,
        start_ticks: 8,
        qmp: "/q".into(),
        machine_type: "pc-q35-10.0".to_string(),
        adopted: true,
        started: Timestamp::now(),
    });
    state.save_runtime(&name("web1"), &runtime).unwrap();
    let all = state.machines().unwrap();
    assert_eq!(all.records, [(spec("web1"), runtime)]);
    fs::remove_file(state.machine_folder(&name("web1")).join("runtime.toml")).unwrap();
    let all = state.machines().unwrap();
    assert!(
        all.records.is_empty() && all.damaged.len() == 1,
        "a lost epoch is damage, not a fresh machine"
    );
}

#[test]
fn a_damaged_record_is_named_and_hides_no_other() {
    let (_dir, state) = state();
    add_volume(&state, "good");
    add_volume(&state, "torn");
    let path = state.volume_folder(&name("torn")).join("volume.toml");
    let whole = fs::read_to_string(&path).unwrap();
    fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    let torn = fs::read_to_string(&path).unwrap();
    let all = state.volumes().unwrap();
    assert_eq!(all.records.len(), 1);
    let error = told(all.damaged.into_iter().next().unwrap());
    assert!(
        error.what.contains("volume.toml") && error.what.contains("damaged"),
        "{}",
        error.what
    );
    assert!(error.next_step.unwrap().contains("do not delete it"));
    assert_eq!(
        fs::read_to_string(&path).unwrap(),
        torn,
        "it was left as found"
    );
}

#[test]
fn a_record_in_anothers_folder_is_damage() {
    let (_dir, state) = state();
    add_volume(&state, "a");
    fs::rename(
        state.volume_folder(&name("a")),
        state.volume_folder(&name("b")),
    )
    .unwrap();
    let error = state.volume(&name("b")).unwrap_err();
    assert!(error.to_string().contains("calls itself `a`"), "{error}");
}

#[test]
fn values_that_cannot_be_are_damage() {
    let (_dir, state) = state();
    add_volume(&state, "a");
    let path = state.volume_folder(&name("a")).join("volume.toml");
    let whole = fs::read_to_string(&path).unwrap();
    for (old, new, word) in [
        ("size = 4096", "size = 4097", "multiple of 512"),
        ("epoch = 1", "epoch = -1", "epoch"),
        ("size = 4096", "size = 4096\nsparse = true", "`sparse`"),
        ("local", "somewhere", "somewhere"),
    ] {
        assert!(whole.contains(old), "{whole}");
        fs::write(&path, whole.replace(old, new)).unwrap();
        let error = state.volume(&name("a")).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn a_folder_that_cannot_be_a_record_is_reported() {
    let (_dir, state) = state();
    fs::create_dir(state.root().join("machines/Web One")).unwrap();
    let all = state.machines().unwrap();
    assert!(
        all.damaged[0]
            .to_string()
            .contains("not the name of a machine")
    );
}

#[test]
fn a_record_that_cannot_be_read_says_so() {
    let (_dir, state) = state();
    add_volume(&state, "a");
    let path = state.volume_folder(&name("a")).join("volume.toml");
    // A folder in its place fails to be read whoever asks; a mode would not stop root.
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    let error = state.volume(&name("a")).unwrap_err();
    assert!(
        matches!(&error, StateError::Io { action: "read", .. }),
        "{error}"
    );
    assert!(told(error).place.unwrap().ends_with("volume.toml"));
}

#[test]
fn a_file_of_absurd_size_is_not_read() {
    let (_dir, state) = state();
    let path = state.root().join("host.toml");
    fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
    assert!(matches!(state.host(), Err(StateError::Damaged { .. })));
}

#[test]
fn migrations_have_a_folder_each() {
    let (_dir, state) = state();
    let id: MigrationId = "m-1".parse().unwrap();
    let folder = state.add_migration(&id).unwrap();
    assert!(matches!(
        state.add_migration(&id),
        Err(StateError::Exists { .. })
    ));
    StateDir::replace_file(&folder.join("journal"), b"x").unwrap();
    assert_eq!(
        StateDir::read_text(&folder.join("journal"))
            .unwrap()
            .as_deref(),
        Some("x")
    );
    assert_eq!(
        state.migrations().unwrap().records,
        std::slice::from_ref(&id)
    );
    state.remove_migration(&id).unwrap();
    assert!(state.migrations().unwrap().records.is_empty());
}

#[test]
fn another_key_under_a_known_name_is_refused() {
    let (_dir, state) = state();
    let store = TrustStore::load(state.peers_path()).unwrap();
    let request = |key: &str, address: &str| TrustRequest {
        name: "b".parse().unwrap(),
        key: format!("whk1-{}", key.repeat(52)).parse().unwrap(),
        addresses: vec![address.parse().unwrap()],
        may: None,
    };
    trust(&store, request("a", "b:1")).unwrap();
    trust(&store, request("a", "b:2")).unwrap();
    let error = trust(&store, request("q", "b:3")).unwrap_err();
    assert!(error.next_step.unwrap().contains("revoke b"));
    let peer = store.get(&"b".parse().unwrap()).unwrap();
    assert_eq!(peer.addresses[0].as_str(), "b:2");
}

#[test]
fn a_port_in_use_is_not_blamed_on_a_peer() {
    let error = ApiError::from(PeerError::PortInUse {
        addr: "127.0.0.1:1".parse().unwrap(),
    });
    assert_eq!(error.code, crate::api::ErrorCode::Io);
    assert!(error.next_step.unwrap().contains("--listen"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a disk makes of a record, reading it ends in the record or in an error that names the file.
    #[test]
    fn a_record_cut_or_scribbled_on_never_passes_for_another(cut in 0usize..300, at in 0usize..300, byte: u8) {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::init(dir.path()).unwrap();
        let record = add_volume(&state, "root");
        let path = state.volume_folder(&record.name).join("volume.toml");
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..cut.min(whole.len())]).unwrap();
        match state.volume(&record.name) {
            Ok(read) => prop_assert_eq!(&read, &record),
            Err(e) => prop_assert_eq!(e.place(), Some(path.as_path())),
        }
        let mut scribbled = whole.clone();
        let at = at % whole.len();
        scribbled[at] = byte;
        fs::write(&path, &scribbled).unwrap();
        if let Err(e) = state.volume(&record.name) {
            prop_assert_eq!(e.place(), Some(path.as_path()));
        }
    }

    #[test]
    fn a_machine_reads_back_as_written(vcpus in 1u32..1000, mib in 1u64..100_000, append in "\\PC{0,40}") {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::init(dir.path()).unwrap();
        let mut machine = spec("web1");
        machine.vcpus = vcpus;
        machine.memory = ByteSize(mib << 20);
        machine.kernel = Some(Path::new("/boot/k").to_path_buf());
        machine.append = Some(append);
        state.add_machine(&machine, &MachineRuntime::fresh()).unwrap();
        prop_assert_eq!(state.machine(&name("web1")).unwrap(), machine);
    }
}
