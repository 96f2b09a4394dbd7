"""Every limit that untrusted input meets, in one place.

Each is far above what honest checkpoints need and low enough that a hostile file costs at most a few hundred
megabytes and a few seconds. `CKPT_LIMITS=10` in the environment multiplies all but those of `FIXED`; a fraction, down
to 0.1, lowers them.
"""

from __future__ import annotations

import os


def _scale() -> float:
    try:
        return max(0.1, float(os.environ.get("CKPT_LIMITS", "1")))
    except ValueError:
        return 1.0


_SCALE = _scale()

PICKLE_OPCODES = int(8_000_000 * _SCALE)
"""Opcodes in one pickle: a tensor takes about 35, so this is over 200,000 tensors."""

PICKLE_BLOCKS = int(2_000_000 * _SCALE)
"""Memory blocks (60 to 100 bytes each) that one pickle's graph may take: a tensor takes nine."""

PICKLE_LINES = int(500_000 * _SCALE)
"""Arguments that are lines of text: slow to read, and rare but for the names of globals."""

MEMO_OUT_OF_ORDER = int(2**18 * _SCALE)
"""Memo slots of one pickle that may be filled out of order; picklers number them from 0 or 1."""

PICKLE_TEXT = int(64 * 2**20 * _SCALE)
"""Bytes of memory for strings that are long, or wider than ASCII, that one pickle may make us hold."""

PICKLE_INFLATED = int(64 * 2**20 * _SCALE)
"""Bytes of a compressed pickle after inflation."""

INLINE_BYTES = int(64 * 2**10 * max(1.0, _SCALE))
"""Strings of a pickle longer than this stay in the file: the graph notes only where they are."""

ENTRIES_FLOOR = int(20_000 * _SCALE)
"""Entries that any pickle may flatten to; beyond them, one for every three bytes, as shared containers multiply."""

ENTRY_BLOCKS = int(700_000 * _SCALE)
"""Memory blocks that the flattened entries of one pickle may take: a tensor takes two."""

NAME_BYTES = int(64 * 2**20 * _SCALE)
"""Bytes of all flattened names together, those of containers included."""

WALK_STEPS = int(1_000_000 * _SCALE)
"""Items of containers that are looked at when any pickle is flattened, some 100 ns each."""

WALK_STEPS_PER_BYTE = int(4 * max(1.0, _SCALE))
"""The same for each byte of the pickle: only shared containers make one byte more than one item."""

STANDARD_INPUT = int(64 * 2**30 * _SCALE)
"""Bytes of standard input that are kept in a temporary file."""

LISTED = int(100_000 * _SCALE)
"""Names that a server's list of a folder may have."""

REMOTE_BYTES = 2**50
"""Bytes of one file elsewhere; a server that says more is not believed."""

REDIRECTS = 5
"""Redirects from one server to the next that one request follows."""

PARTS_WITHIN = 16
"""Tensors that are made of tensors that are made of tensors…"""

NAME_LENGTH = int(64 * 2**10 * _SCALE)
"""Characters of the name of a tensor in safetensors."""

NESTING = 1_000
"""Containers within containers, when a graph is flattened to names."""

PLAIN_NESTING = 8 * NESTING
"""Nodes within nodes of a pickle that `convert --plain` makes plain: an object that is open to names is one of up to
eight, with its arguments and states."""

GROUP_NESTING = 100
"""Maps, lists and groups within each other in msgpack and HDF5."""

MATCH_SECONDS = 2.0 * _SCALE
"""Seconds of the processor that one regular expression may take for all names: 100,000 take a tenth of one."""

MATCH_STEPS = int(400_000 * _SCALE)
"""Names that `match` tries substitutions on, some 3 µs each: with 10,000 names, 40 substitutions."""

MATCH_SUBS = int(40 * _SCALE)
"""Substitutions of a renaming that is written as one command."""

STATS_LINES = int(1_000_000 * _SCALE)
"""Rows or columns that `stats --by` summarizes, about 100 bytes each: vocabularies have up to 300,000."""

TREE_NODES = int(200_000 * _SCALE)
"""Modules and containers in the tree of one checkpoint: 256 experts in each of 60 layers take about 60,000."""

TREE_TEXT = int(64 * 2**20 * _SCALE)
"""Characters of that tree when every module is written out."""

ZIP_RECORDS = int(250_000 * _SCALE)
"""Records in one zip file."""

ZIP_DIRECTORY = int(48 * 2**20 * _SCALE)
"""Bytes of a zip file's central directory."""

ZIP_NOTE_RECORD = int(64 * 2**10 * max(1.0, _SCALE))
"""Bytes of a small record such as `version` or `byteorder`."""

SALVAGE_TRIES = int(500_000 * _SCALE)
"""Places in a cut zip file that look like the end of a record and are compared with its beginning."""

SCRIPT_CODE = int(16 * 2**20 * _SCALE)
"""Bytes of a TorchScript archive's code that are read to tell parameters from buffers."""

SCRIPT_DECLARED = int(2 * 2**20 * _SCALE)
"""Bytes of the names of parameters and buffers in that code."""

SCRIPT_EXTRA = int(2**20 * _SCALE)
"""Bytes of a TorchScript archive's extra files that are read, to be shown."""

ZIP_JSON = int(48 * 2**20 * _SCALE)
"""Bytes of a JSON record of a zip file."""

ZIP_JSON_PARSED = int(160 * 2**20 * _SCALE)
"""Estimated bytes of memory of the JSON records of one zip file once parsed."""

SAFETENSORS_HEADER = int(100_000_000 * _SCALE)
"""Bytes of a safetensors header that is read: the reference library's own limit, which nothing raises there."""

SAFETENSORS_WRITTEN = 100_000_000
"""Bytes of a safetensors header that is written: the reference library reads no longer one."""

METADATA = int(8 * 2**20 * _SCALE)
"""Characters of a safetensors header's `__metadata__`, with 64 more for each of its entries."""

SAFETENSORS_PARSED = int(160 * 2**20 * _SCALE)
"""Estimated bytes of memory of a safetensors header once parsed."""

INDEX_JSON = int(32 * 2**20 * _SCALE)
"""Bytes of the index of a set of shards: some 100 a tensor."""

SHARDS = int(10_000 * _SCALE)
"""Files that one set consists of."""

RUN_JSON = int(32 * 2**20 * _SCALE)
"""Bytes of the trainer_state.json of a run: some 150 a line of its log."""

RUN_JSON_PARSED = int(200 * 2**20 * _SCALE)
"""Estimated bytes of memory of it once parsed."""

RUN_VALUES = int(300_000 * _SCALE)
"""Values of it that are listed, some 300 bytes each: a line of the log has six."""

DIMENSIONS = 64
"""Dimensions of a tensor: torch and numpy stop at 64."""

REPEATED = int(16 * 2**20 * _SCALE)
"""Elements of a view that has more of them than its storage, such as an expanded one, that are gone through."""

REPEATED_PART = int(2**20 * _SCALE)
"""The same of a part that says how other elements are to be read: scales, indices, offsets."""

CONSTITUENTS = int(20_000 * _SCALE)
"""Constituents of nested tensors that one command goes through one by one."""

REPEATED_AS_TEXT = int(2**20 * _SCALE)
"""The same where each becomes text."""

READ_TIMES = 4
"""Times that one command goes through all bytes of a file, as tied names make it do."""

READ_AGAIN = int(2**30 * _SCALE)
"""Bytes of views of shared storages that it goes through beyond that."""

READ_AGAIN_AS_TEXT = int(2**20 * _SCALE)
"""The same where they become text."""

INFLATED_AT_ONCE = int(64 * 2**20 * _SCALE)
"""Bytes of a compressed storage that are held at once."""

INFLATED_IN_ALL = int(2**30 * _SCALE)
"""Bytes that one command inflates: compressed checkpoints are rare, and small ones."""

VIEW_PAIRS = int(4_000 * _SCALE)
"""Pairs of views that one command compares exactly; beyond them spans decide whether views meet."""

VIEW_STEPS = 1_000
"""Steps of one exact comparison of two views: it is an integer programme, hard only for contrived strides."""

CONFIG_JSON = int(4 * 2**20 * _SCALE)
"""Bytes of a `config.json` beside a checkpoint; a larger one is not read."""

QUANT_STATE = int(64 * 2**10 * _SCALE)
"""Bytes of the JSON that says how one weight of bitsandbytes is quantized; real ones have 200."""

ADAPTER_JSON = int(2**20 * _SCALE)
"""Bytes of the `adapter_config.json` of a LoRA adapter."""

BESIDE_FILE = int(64 * 2**20 * _SCALE)
"""Bytes of a file beside a model's weights that is copied to a new folder: a tokenizer's JSON takes up to 40 MB."""

BESIDE_BYTES = int(512 * 2**20 * _SCALE)
"""Bytes of all of them together."""

BESIDE_FILES = int(1_000 * _SCALE)
"""The number of them that are copied."""

BESIDE_LOOKED_AT = int(20_000 * _SCALE)
"""Files of a folder that are looked at to find them."""

SCAN_OPCODES = int(24_000_000 * _SCALE)
"""Opcodes of all pickles that one scan reads."""

SCAN_OPCODES_FLOOR = int(6_000_000 * _SCALE)
"""Opcodes of these that a scan may read of any file; beyond them, four for each byte of the files that it opens."""

SCAN_BLOCKS_FLOOR = int(1_600_000 * _SCALE)
"""Memory blocks that its pickles may take together, before those that the size of its files allows."""

SCAN_RECORDS_FLOOR = int(60_000 * _SCALE)
"""Records of all zip files that it looks at; beyond them, one for every 46 bytes of the files that it opens."""

SCAN_BYTES = int(64 * 2**20 * _SCALE)
"""Bytes of strings, of gaps between records and of trailing bytes that one scan searches for hidden pickles."""

SCAN_TRIES = int(50_000 * _SCALE)
"""Places at which one scan tries whether a pickle begins there."""

SCAN_NESTING = 4
"""Pickles and files within pickles and files, when a file is scanned."""

SCAN_FILES = int(100_000 * _SCALE)
"""Files of a directory, zips back to back, or members of a tar that one scan opens."""

SCAN_INFLATED = int(256 * 2**20 * _SCALE)
"""Bytes that one scan inflates of compressed files."""

SCAN_HELD = int(64 * 2**20 * _SCALE)
"""Bytes of these that are in memory at once."""

SCAN_CHECKSUMS = int(512 * 2**20 * _SCALE)
"""Bytes of pickles in zip files whose checksums one scan computes."""

SCAN_STORED_FLOOR = int(16 * 2**20 * _SCALE)
"""Bytes of records, as they are stored, that it looks at; beyond them, four for each byte of its files."""

SCAN_FINDINGS = int(10_000 * _SCALE)
"""Findings that one scan lists, those of harmless names not counted."""

SAVES = int(1_000 * _SCALE)
"""Saves or pickles that stand one after another in one file."""

TAR_MEMBERS = int(1_000 * _SCALE)
"""Members of a tar file that are gone through to find the four that torch wrote."""

TAR_ITEMS = int(50_000 * _SCALE)
"""Storages or tensors in the lists of a tar file: each is a pickle of its own."""

NPZ_ARRAYS = int(50_000 * _SCALE)
"""Arrays in an npz file: each has a header to read."""

NPY_HEADER = int(10_000 * _SCALE)
"""Bytes of a numpy array's header: numpy's own limit."""

NPY_ARRAYS = int(50_000 * _SCALE)
"""Arrays that stand one after another in one file: each has a header to read."""

NPY_HEADERS = int(16 * 2**20 * _SCALE)
"""Bytes of the headers of all these: one takes 128 bytes, and the longest ones a millisecond."""

NPY_PREFACE = int(2**20 * _SCALE)
"""Bytes of the JSON that may stand before the first of them."""

MSGPACK_ITEMS = int(500_000 * _SCALE)
"""Items of a msgpack file: maps, lists, numbers and arrays; a state of Flax has about two for each tensor."""

H5_ITEMS = int(100_000 * _SCALE)
"""Groups and datasets of an HDF5 file; h5py takes some 50 µs for each."""

ONNX_INITIALIZERS = int(100_000 * _SCALE)
"""Initializers of an ONNX model."""

ONNX_FIELDS = int(1_000_000 * _SCALE)
"""Fields of an ONNX model that are looked at: those of its initializers, and one for each node of the graph."""

CHUNKS = int(1_000_000 * _SCALE)
"""Chunks that all tensors of a distributed checkpoint have together."""

CHUNK_PAIRS = int(2_000_000 * _SCALE)
"""Pairs of one tensor's chunks that are compared to find out whether they overlap."""

SCATTERED = int(131_072 * _SCALE)
"""Pieces in which a range of a tensor may lie to be changed at once: each is a read and a patch."""

ITEM_BYTES = int(256 * 2**10 * max(1.0, _SCALE))
"""Bytes of a pickled value among the items of a distributed checkpoint; a larger one is not read to be listed."""

ITEMS_READ = int(16 * 2**20 * _SCALE)
"""Bytes of pickles that the items of a distributed checkpoint may have beyond those of its files, a few times."""

DCP_ITEMS = int(100_000 * _SCALE)
"""Items of lists that are named nowhere, when the lists of a distributed checkpoint are made again."""

DCP_VALUES = int(64 * 2**20 * _SCALE)
"""Bytes of pickles of all values of a distributed checkpoint that are written to one file."""

DCP_ITEMS_FLOOR = int(3_000 * _SCALE)
"""Entries that are written to a distributed checkpoint, some 0.3 ms each; beyond them, one for every 128 bytes read."""

OPTIMIZER_PARAMETERS = int(1_000_000 * _SCALE)
"""Parameters that the groups of one optimizer list, when its states are paired with them."""

EXPRESSION_CHARACTERS = int(100_000 * _SCALE)
"""Characters of an expression that makes a tensor of others."""

EXPRESSION_NODES = int(10_000 * _SCALE)
"""Names, numbers, calls and operators of one."""

EXPRESSION_BYTES = int(2**38 * _SCALE)
"""Bytes of the tensor that one makes: a few words can ask for any number."""

RECIPE_BYTES = int(4 * 2**20 * _SCALE)
"""Bytes of a recipe of `apply`."""

RECIPE_STEPS = int(10_000 * _SCALE)
"""Steps of one, and layers that one of them stacks."""

EXPRESSION_DEPTH = 80
"""Levels of its tree: Python's own stack holds a few hundred calls."""

RANK_FILES = int(20_000 * _SCALE)
"""Files of one distributed checkpoint, which may have one an item."""

DCP_METADATA = int(512 * 2**20 * _SCALE)
"""Bytes of the `.metadata` of a distributed checkpoint."""

CHECK_FINDINGS = 20
"""Findings of one code that a check lists one by one."""

FIXED = frozenset({"PARTS_WITHIN", "REDIRECTS", "REMOTE_BYTES", "NESTING", "GROUP_NESTING", "SAFETENSORS_WRITTEN",
                   "DIMENSIONS", "READ_TIMES", "VIEW_STEPS", "SCAN_NESTING", "CHECK_FINDINGS",
                   "PLAIN_NESTING", "EXPRESSION_DEPTH"})  # fmt: skip
# The limits that `CKPT_LIMITS` does not change: those of other software, of nesting, and of what is listed.
