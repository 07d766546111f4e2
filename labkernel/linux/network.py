import socket,fcntl,struct
def loopback_up():
    with socket.socket(socket.AF_INET,socket.SOCK_DGRAM) as s:
        fcntl.ioctl(s,0x8914,struct.pack('16sh14x',b'lo',0x1|0x40))
