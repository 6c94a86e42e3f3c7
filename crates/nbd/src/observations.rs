//! What this crate observes.

strake_observe::catalog! {
    /// Every kind of observation of this crate.
    pub static CATALOG;

    /// The other side does not speak the protocol.
    Malformed("nbd.malformed") {
        /// What was being read.
        what: String,
        /// What is wrong with it.
        why: String,
    }
    text "malformed {what}: {why}";
    remedy "check that the other side speaks NBD (fixed newstyle), and its version";

    /// An address of an NBD server that cannot be understood.
    BadUri("nbd.bad-uri") {
        /// The address as it was given.
        uri: String,
        /// What is wrong with it.
        why: String,
    }
    text "'{uri}' is not the address of an NBD export: {why}";
    remedy "write nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH, with nbds for TLS";

    /// The server cannot be reached.
    ConnectFailed("nbd.connect-failed") {
        /// The server.
        server: String,
    }
    text "no connection to the NBD server at {server}";
    remedy "check that the server runs, listens there and lets this host in";

    /// The server and this client did not agree.
    NegotiationFailed("nbd.negotiation-failed") {
        /// The server.
        server: String,
        /// The export asked for.
        export: String,
    }
    text "the NBD server at {server} does not give export '{export}'";
    remedy "do what the cause below asks for";

    /// The server answered an option with an error.
    OptionRefused("nbd.option-refused") {
        /// The option's name.
        option: String,
        /// The name of the reply.
        reply: String,
        /// The server's own words.
        message: String,
        /// What can be done.
        advice: String,
    }
    text "the server refused {option} with {reply}: {message}";
    remedy "{advice}";

    /// The export's blocks are larger than a disk's sectors.
    BlocksTooLarge("nbd.blocks-too-large") {
        /// The export.
        path: String,
        /// The server's smallest block.
        minimum: u32,
    }
    text "{path} takes only requests in blocks of {minimum} bytes, a disk has sectors of 512";
    remedy "serve it through something that takes smaller requests, for example nbdkit --filter=blocksize";

    /// The export's size is of no use as a disk.
    BadSize("nbd.bad-size") {
        /// The export.
        path: String,
        /// Its size in bytes.
        size: u64,
    }
    text "{path} has {size} bytes, which is not a positive multiple of 512";
    remedy "serve it with a size in whole sectors, for example through nbdkit --filter=truncate round-up=512";

    /// The export is read-only, or its server cannot make writes durable.
    NotWritable("nbd.not-writable") {
        /// The export.
        path: String,
        /// Why.
        why: String,
        /// What can be done.
        advice: String,
    }
    text "{path} cannot be used for writing: {why}";
    remedy "{advice}";

    /// The connection ended while it was needed.
    ConnectionLost("nbd.connection-lost") {
        /// The export.
        path: String,
        /// Why, as far as is known.
        why: String,
    }
    text "the connection to {path} is lost: {why}";
    remedy "check the server and the network, then open the disk again (restart the VM, or start the job again)";

    /// The server answered a request with an error.
    ServerError("nbd.server-error") {
        /// The export.
        path: String,
        /// The protocol's error number.
        error: u32,
        /// Its name.
        name: String,
        /// The server's own words, if it gave any.
        message: String,
    }
    text "the server of {path} answered {name}: {message}";
    remedy "look at the server's log; it knows the reason";

    /// The server cannot listen.
    ListenFailed("nbd.listen-failed") {
        /// Where.
        address: String,
    }
    text "no NBD server can listen at {address}";
    remedy "choose an address that is free, or remove the socket that an earlier server left";

    /// A client's session ended because of an error.
    SessionFailed("nbd.session-failed") {
        /// The client.
        client: String,
        /// What it was using.
        export: String,
    }
    text "the NBD session of {client} on export '{export}' was ended";
    remedy "look at the cause below and at the client; other sessions go on";

    /// One more client than are allowed.
    TooManyClients("nbd.too-many-clients") {
        /// How many are allowed.
        limit: u64,
    }
    text "an NBD client was turned away: {limit} are connected";
    remedy "disconnect clients that are not needed";

    /// The other side took too long to shake hands.
    HandshakeTimeout("nbd.handshake-timeout") {
        /// How long was waited, in seconds.
        seconds: u64,
    }
    text "the other side did not finish the negotiation within {seconds} s";
    remedy "check the network and the other side";

    /// TLS cannot be used as asked.
    TlsUnusable("nbd.tls-unusable") {
        /// What was being set up.
        what: String,
        /// Why not.
        why: String,
    }
    text "{what}: {why}";
    remedy "give certificates and a key in PEM, issued by the given authority and naming the host as a subject alternative name";

    /// The TLS session failed.
    TlsFailed("nbd.tls-failed") {
        /// Why.
        why: String,
    }
    text "TLS with the other side failed: {why}";
    remedy "check both sides' certificates: issuer, dates, and that the server's names the host that is connected to";

    /// TLS was asked for and the server has none, or the other way round.
    TlsMismatch("nbd.tls-mismatch") {
        /// What was met.
        what: String,
    }
    text "{what}";
    remedy "use nbds:// with certificates exactly if the server uses TLS";
}
