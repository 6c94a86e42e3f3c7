//! What the devices see.

strake_observe::catalog! {
    /// The catalog of this crate.
    pub static CATALOG;

    /// Two devices want the same addresses.
    AddressTaken("devices.address-taken") {
        /// The first address.
        start: u64,
        /// The address behind the last one.
        end: u64,
    }
    text "the bus addresses {start:#x}..{end:#x} are empty or taken by another device";
    remedy "this is a fault of the monitor's machine layout: report it";

    /// A PCI slot cannot be used.
    SlotUnusable("devices.slot-unusable") {
        /// The device that wants it.
        device: String,
        /// The slot.
        slot: u8,
        /// Why not.
        reason: String,
    }
    text "device '{device}' cannot be in PCI slot {slot}: {reason}";
    remedy "give the device a free slot from 1 to 31";

    /// A component was asked for a step that its phase does not have.
    WrongPhase("devices.wrong-phase") {
        /// The component.
        component: String,
        /// Where it is.
        phase: String,
        /// What it was asked for.
        asked: String,
    }
    text "'{component}' cannot {asked}: it is {phase}";
    remedy "this is a fault of the monitor: report it";

    /// A device could not be built or started.
    DeviceUnusable("devices.unusable") {
        /// The device.
        device: String,
        /// What was being done.
        doing: String,
    }
    text "device '{device}': {doing} failed";
    remedy "see the cause below";

    /// A device did not stand still in time.
    QuiesceTimeout("devices.quiesce-timeout") {
        /// The device.
        device: String,
        /// How long was waited.
        waited_ms: u64,
    }
    text "device '{device}' still had requests in flight after {waited_ms} ms";
    remedy "see whether the store behind it is slow or unreachable, then try again; the VM goes on";

    /// The guest's driver broke the protocol of a device.
    GuestBrokeRing("devices.guest-broke-ring") {
        /// The device.
        device: String,
        /// The queue.
        queue: u16,
        /// What is wrong with it.
        reason: String,
    }
    text "the guest's driver of '{device}' broke queue {queue}: {reason}; the device waits for its reset";
    remedy "reboot the guest; if it is a stock kernel, report it";

    /// A vhost-user front-end broke the protocol.
    FrontEndBroke("devices.front-end-broke") {
        /// The device.
        device: String,
        /// What it did.
        reason: String,
    }
    text "the vhost-user front-end of '{device}' was disconnected: {reason}";
    remedy "check the front-end's options (its memory must be shared: memory-backend-memfd,share=on); if it is a stock VMM, report it";

    /// A worker thread ended by a panic.
    WorkerDied("devices.worker-died") {
        /// The device.
        device: String,
    }
    text "a worker of device '{device}' died";
    remedy "this is a fault of the monitor: restart the VM and report it";

    /// A doorbell could not be connected; the device works, slower.
    DoorbellRefused("devices.doorbell-refused") {
        /// The device.
        device: String,
        /// The address.
        address: u64,
    }
    text "the doorbell of '{device}' at {address:#x} is not connected: each kick leaves the guest";
    remedy "see the cause below";

    /// An MSI-X route was refused: the guest misses this interrupt.
    RouteRefused("devices.route-refused") {
        /// The device.
        device: String,
        /// The vector.
        vector: u16,
    }
    text "the route of MSI-X vector {vector} of '{device}' was refused";
    remedy "see the cause below";

    /// A network backend failed.
    TapFailed("devices.tap-failed") {
        /// The device.
        device: String,
        /// What was done with it.
        doing: String,
    }
    text "the tap of '{device}' failed: {doing}";
    remedy "check that the tap exists and was opened with IFF_NO_PI and IFF_VNET_HDR";

    /// A console's output was lost.
    ConsoleOutputLost("devices.console-output-lost") {
        /// The console.
        device: String,
        /// How many bytes.
        bytes: u64,
    }
    text "{bytes} bytes of the output of '{device}' were lost";
    remedy "check the store of the console log; a terminal that does not read loses output too";
}
