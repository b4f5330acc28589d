from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReadSlotRequest(_message.Message):
    __slots__ = ("job", "rank", "step")
    JOB_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    job: str
    rank: int
    step: int
    def __init__(self, job: _Optional[str] = ..., rank: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class SlotChunk(_message.Message):
    __slots__ = ("record", "data", "complete")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    record: PeerSlotRecord
    data: bytes
    complete: bool
    def __init__(self, record: _Optional[_Union[PeerSlotRecord, _Mapping]] = ..., data: _Optional[bytes] = ..., complete: _Optional[bool] = ...) -> None: ...

class PeerSlotRecord(_message.Message):
    __slots__ = ("generation", "step", "digest", "chain", "nbytes")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    generation: int
    step: int
    digest: int
    chain: int
    nbytes: int
    def __init__(self, generation: _Optional[int] = ..., step: _Optional[int] = ..., digest: _Optional[int] = ..., chain: _Optional[int] = ..., nbytes: _Optional[int] = ...) -> None: ...
