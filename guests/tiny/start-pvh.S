/* Entry of the PVH guest: 32-bit protected mode, flat segments, no paging, %ebx = hvm_start_info. */
#include "notes.h"

NOTE(NOTE_GUEST_OS, .asciz, "xtool-tiny")
NOTE(NOTE_XEN_VERSION, .asciz, "xen-3.0")
NOTE(NOTE_LOADER, .asciz, "generic")
NOTE(NOTE_PHYS32_ENTRY, .long, _start)
NOTE(NOTE_FEATURES, .asciz, "hvm_callback_vector|linux_rsdp_unrestricted")

    .text
    .globl _start, hypercall, hypercall_page
_start:
    cld
    mov $stack_end, %esp
    xor %ebp, %ebp
    push %ebx
    call pvh_main
    ud2

/* long hypercall(number, a, b, c, d): Xen fills the page with one 32-byte stub per number. */
hypercall:
    push %ebx
    push %esi
    push %edi
    mov 16(%esp), %eax
    mov 20(%esp), %ebx
    mov 24(%esp), %ecx
    mov 28(%esp), %edx
    mov 32(%esp), %esi
    shl $5, %eax
    add $hypercall_page, %eax
    call *%eax
    pop %edi
    pop %esi
    pop %ebx
    ret

    .bss
    .balign 4096
hypercall_page:
    .skip 4096
    .skip 8192
stack_end:

    .section .note.GNU-stack, "", @progbits
