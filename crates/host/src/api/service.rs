//! What the daemon does for the API, one method per operation.

use super::error::ApiError;
use super::types::*;
use crate::state::{MachineSpec, MigrationId, Name, RateLimit};
use tokio::sync::watch;
use whimbrel_peer::invitation::InvitationId;
use whimbrel_peer::trust::PeerName;

/// An operation's future. A client that goes away drops it, except where the method says otherwise.
macro_rules! answer {
    ($type:ty) => { impl Future<Output = Result<$type, ApiError>> + Send };
}

/// The daemon behind the API. Requests come in concurrently; syntax and names are checked before a method
/// is called, everything about the present state of things is the method's to check.
pub trait Service: Send + Sync + 'static {
    fn host(&self) -> answer!(HostView);

    fn peers(&self) -> answer!(Listed<PeerView>);
    /// Trusts a peer from the next connection on. The same key under the same name gets the new addresses;
    /// another key under a known name is refused.
    fn trust(&self, request: TrustRequest) -> answer!(PeerView);
    /// Trusts a peer no more and cuts the connections it has. Refused while a migration with it is under
    /// way, unless forced.
    fn revoke(&self, name: PeerName, force: bool) -> answer!(());
    /// Calls a peer by another name from now on, migrations under way included.
    fn rename_peer(&self, name: PeerName, new: PeerName) -> answer!(PeerView);
    /// Changes what a peer may do from its next migration on.
    fn allow_peer(&self, name: PeerName, change: AllowPeer) -> answer!(PeerView);

    fn invitations(&self) -> answer!(Listed<InvitationView>);
    fn invite(&self, request: InviteRequest) -> answer!(InviteView);
    fn cancel_invitation(&self, id: InvitationId) -> answer!(InvitationView);
    /// Joins the host that made an invitation: both trust each other then.
    fn join_host(&self, request: JoinHost) -> answer!(JoinView);

    fn volumes(&self) -> answer!(Listed<VolumeView>);
    fn volume(&self, name: Name) -> answer!(VolumeView);
    fn create_volume(&self, request: CreateVolume) -> answer!(VolumeView);
    /// Makes a volume from a file, telling how far it is as often as it likes (only the newest is kept).
    /// Dropped when the client goes away: nothing of the volume must then remain.
    fn import_volume(
        &self,
        request: ImportVolume,
        progress: watch::Sender<ImportProgress>,
    ) -> answer!(VolumeView);
    /// Writes the volume's content to a new file; as an import, it ends with its client.
    fn export_volume(
        &self,
        name: Name,
        request: ExportVolume,
        progress: watch::Sender<ImportProgress>,
    ) -> answer!(VolumeView);
    /// Makes another volume of the same content; as an import, it ends with its client.
    fn clone_volume(
        &self,
        name: Name,
        request: CloneVolume,
        progress: watch::Sender<ImportProgress>,
    ) -> answer!(VolumeView);
    /// Serves the volume over NBD; ends with its client only. There is a total once clients can connect.
    fn serve_volume(
        &self,
        name: Name,
        request: ServeVolume,
        progress: watch::Sender<ImportProgress>,
    ) -> answer!(VolumeView);
    /// Records what a guest asks of a disk, named by its volume, or by its machine if that has but one. If the client
    /// goes away, what was recorded stays.
    fn record_trace(
        &self,
        name: Name,
        request: RecordTrace,
        progress: watch::Sender<RecordingProgress>,
    ) -> answer!(RecordingView);
    fn end_recording(&self, name: Name) -> answer!(());
    fn resize_volume(&self, name: Name, request: ResizeVolume) -> answer!(VolumeView);
    fn check_volume(&self, name: Name, request: CheckVolume) -> answer!(CheckView);
    /// What of the volume is where, in so many cells.
    fn map_volume(&self, name: Name, cells: usize) -> answer!(MapView);
    /// The extents that its guest uses most.
    fn heat_volume(&self, name: Name, top: usize) -> answer!(HeatView);
    fn remove_volume(&self, name: Name) -> answer!(());

    fn machines(&self) -> answer!(Listed<MachineView>);
    fn machine(&self, name: Name) -> answer!(MachineView);
    /// The description was checked; whether its volumes and networks exist was not.
    fn define_machine(&self, spec: MachineSpec) -> answer!(MachineView);
    fn start_machine(&self, name: Name) -> answer!(MachineView);
    fn stop_machine(&self, name: Name, request: StopRequest) -> answer!(MachineView);
    /// Makes a snapshot of the machine's volumes; as an import, it ends with its client.
    fn create_snapshot(
        &self,
        machine: Name,
        request: CreateSnapshot,
        progress: watch::Sender<ImportProgress>,
    ) -> answer!(SnapshotView);
    /// Lets a guest go on that a disk's error paused.
    fn resume_machine(&self, name: Name) -> answer!(MachineView);
    /// Where a machine stands whose move does not go on, and what may be done.
    fn recovery(&self, name: Name) -> answer!(RecoveryView);
    /// Takes a machine back that was handed over and has not wholly arrived.
    fn recover(&self, name: Name, request: RecoverRequest) -> answer!(MigrationView);
    fn adopt_machine(&self, request: AdoptRequest) -> answer!(MachineView);
    fn undefine_machine(&self, name: Name) -> answer!(());

    fn migrations(&self) -> answer!(Listed<MigrationView>);
    fn migration(&self, id: MigrationId) -> answer!(MigrationView);
    /// Starts a migration and returns at once; it goes on whether or not anybody watches.
    fn migrate(&self, request: MigrateRequest) -> answer!(MigrationView);
    /// Ends the hold of the machine's migration.
    fn switch(&self, machine: Name) -> answer!(MigrationView);
    fn cancel(&self, machine: Name) -> answer!(MigrationView);
    /// Changes the bandwidth of the machine's migration from now on.
    fn throttle(&self, machine: Name, bandwidth: RateLimit) -> answer!(MigrationView);
    /// Migrations of which there is a report, newest first; also such as earlier daemons left.
    fn reports(&self) -> answer!(Listed<ReportEntry>);
    /// Everything this host knows of a migration, at any time after it began.
    fn report(&self, id: MigrationId) -> answer!(ReportView);
    /// The migration's view, now and whenever it changes. May be dropped at any time.
    fn watch(&self, id: MigrationId) -> answer!(watch::Receiver<MigrationView>);
}
